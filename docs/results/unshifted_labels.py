"""What a loss of 0.01 on fresh text means: train quickstart's model once on its own input, once on the next token.

Run from the project's folder: .venv/bin/python docs/results/unshifted_labels.py (three minutes on two CPU cores).
"""

import numpy as np
import torch

from smoltrain.config.load import load_config
from smoltrain.data.tokens.packing import count_rows
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.data.tokens.token_files import MappedTokens
from smoltrain.inference.generate import generate_ids
from smoltrain.model.build import build_model

recipe = load_config("quickstart", ["run.name=unshifted-labels"])
prepared = prepare_run_data(recipe, rows_per_step=16)
T = recipe.batch.sequence_length


def rows(tokens: MappedTokens, indices: np.ndarray) -> torch.Tensor:
    """Rows of T + 1 ids, int64 [len(indices), T + 1]."""
    return torch.tensor(tokens.read_rows(indices.astype(np.int64) * T, T + 1).astype(np.int64))


[train] = prepared.train  # of the recipe's one source
[validation] = prepared.validation
held_out = rows(validation, np.linspace(0, count_rows(len(validation), T) - 1, 32))
for name, shift in (("its own token (labels not shifted)", 0), ("the next token (labels shifted)", 1)):
    torch.manual_seed(0)
    draws = np.random.default_rng(0)
    decoder = build_model(recipe.model)
    adamw = torch.optim.AdamW(decoder.parameters(), lr=2e-3, weight_decay=0.01)
    print(f"\ntrained to predict {name}\n  step   training loss   held out: own token   held out: next token")
    for step in range(1, 201):
        batch = rows(train, draws.integers(0, count_rows(len(train), T), 16))
        ids, labels = batch[:, :-1].contiguous(), batch[:, shift : shift + T].contiguous()
        loss = decoder(ids, labels) / labels.numel()
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        adamw.step()
        if step in (1, 10, 25, 50, 100, 200):
            with torch.no_grad():
                ids = held_out[:, :-1].contiguous()
                own, following = (decoder(ids, held_out[:, s : s + T].contiguous()) / ids.numel() for s in (0, 1))
            print(f"  {step:4d}   {loss.item():13.4f}   {own.item():19.4f}   {following.item():20.4f}", flush=True)
    prompt = prepared.tokenizer.encode("**ROMEO**  \nWhat")
    text = prepared.tokenizer.decode(list(generate_ids(decoder, prompt, recipe.generation, greedy=True)))
    print(f"  greedy continuation of '**ROMEO** What': {text[:120]!r}")
