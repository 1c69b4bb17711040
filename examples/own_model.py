"""Train a torch module of one's own, ids in and logits out: python examples/own_model.py [FOLDER]."""

import sys

import smoltrain
from torch import Tensor, nn
from torch.nn import functional as F

config = smoltrain.load_config(
    "quickstart",
    {"phases.main.steps": 30, "phases.continuation.steps": 5, "phases.main.lr": 5e-3, "sample.every": 0},
    run={"name": "example-own-model", "folder": sys.argv[1] if len(sys.argv) > 1 else "runs"},
    optimizer={"kind": "adamw"},  # muon is for matrices, of which there is none
    track={"wandb": "off"},
)


class Convolutions(nn.Module):
    """Causal convolutions instead of attention: each layer looks three tokens back."""

    def __init__(self, vocab_size: int = config.model.vocab_size, width: int = 128) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(nn.Conv1d(width, width, kernel_size=4) for _ in range(3))
        self.head = nn.Linear(width, vocab_size)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Token ids [B, T] -> logits [B, T, V]."""
        x_BDT = self.embed(ids_BT).transpose(1, 2)
        for layer in self.layers:
            x_BDT = x_BDT + F.gelu(layer(F.pad(x_BDT, (3, 0))))
        return self.head(x_BDT.transpose(1, 2))


run = smoltrain.train(config, model=Convolutions)
model = run.load(model=Convolutions)  # the run's folder has the weights; only this program knows the module
print(model.generate("**ROMEO**  \n", max_tokens=40, seed=1))
print(f"{model.loss('To be, or not to be'):.3f} nats per token")
