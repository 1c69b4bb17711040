"""Train a torch module of one's own: token ids in, causal logits out, and smoltrain does the rest.

python examples/own_model.py [FOLDER]
"""

import sys

from torch import Tensor, nn

import smoltrain

config = smoltrain.load_config(
    "quickstart",
    {"phases.main.steps": 30, "phases.continuation.steps": 5, "phases.main.lr": 5e-3},
    run={"name": "example-own-model", "folder": sys.argv[1] if len(sys.argv) > 1 else "runs"},
    track={"wandb": "off"},
)


class Recurrent(nn.Module):
    """A gated recurrent network (Cho et al. 2014) instead of attention."""

    def __init__(self, vocab_size: int = config.model.vocab_size, width: int = 128) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.mix = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Token ids [B, T] -> logits [B, T, V]."""
        hidden_BTD, _ = self.mix(self.embed(ids_BT))
        return self.head(hidden_BTD)


run = smoltrain.train(config, model=Recurrent)
model = run.load(model=Recurrent)  # the run's folder has the weights; only this program knows the module
print(model.generate("**ROMEO**  \n", max_tokens=40, seed=1))
print(f"{model.loss('To be, or not to be'):.3f} nats per token")
