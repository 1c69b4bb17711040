"""Rows of random ids for any vocabulary, through the trainer's own data path, and the same rows as an array for others.

Ids follow a skewed law, so that a trainer that works soon has a loss below the log of the vocabulary's size. Each id is
one word of the text, so that tokenising gives the ids back.
"""

import json
from pathlib import Path

import numpy as np
import tokenizers
import torch
from tokenizers import AddedToken, models, pre_tokenizers

from smoltrain.config.schema import Config
from smoltrain.data.rows.open_loader import open_loader
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokens.prepare import prepare_run_data

SEPARATOR, SEED = "<|endoftext|>", 1234
SKEW = 6  # id = V u^6 for uniform u: half of all ids are among the first 1.6 %
WORDS = 1000  # of a document


def random_rows_overrides(folder: Path) -> list[str]:
    """What makes a recipe train on what write_random_rows has written to the folder."""
    return [
        f"data.path={folder / 'train.jsonl'}", f"data.validation_path={folder / 'validation.jsonl'}",
        "data.text_field=text", "data.mode=cached", f"data.cache={folder / 'tokens'}",
        f"tokenizer.name={folder / 'tokenizer'}", "tokenizer.vocab_size=null", f"tokenizer.separator={SEPARATOR}",
        "tokenizer.pad=null",
    ]  # fmt: skip


def write_random_rows(folder: Path, vocab_size: int, num_tokens: int, sequence_length: int) -> None:
    """Documents of at least so many tokens, a few rows to validate on, and the tokenizer of these words."""
    folder.mkdir(parents=True)
    words = [SEPARATOR, *(f"{i:x}" for i in range(1, vocab_size))]
    inner = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=SEPARATOR))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens([AddedToken(SEPARATOR, special=True, normalized=False)])
    Tokenizer(inner, SEPARATOR).save(folder / "tokenizer")
    draw = np.random.default_rng(SEED)
    for name, size in (("train", num_tokens), ("validation", 8 * sequence_length)):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(size // WORDS + 1):
                ids = 1 + ((vocab_size - 1) * draw.random(WORDS) ** SKEW).astype(int)
                file.write(json.dumps({"text": " ".join(words[i] for i in ids)}) + "\n")


def collect_first_rows(settings: Config, steps: int, rows_per_step: int) -> np.ndarray:
    """The very rows of a run's first steps on any number of ranks, int32 (steps x rows_per_step, T + 1)."""
    prepare_run_data(settings, rows_per_step, 1)
    accumulation = rows_per_step // settings.batch.micro_batch_rows
    loader = open_loader(settings, 0, 1, rows_per_step=rows_per_step, accumulation=accumulation)
    dealt: list[torch.Tensor] = []
    for _ in range(steps):
        rows = loader.fetch_step_rows()
        dealt += [batch.ids_BS for batch in rows.micro_batches]
        loader.mark_consumed(loader.unpack_totals(rows.counts))
    loader.close()
    return torch.cat(dealt).numpy()
