"""The rows that a run of ours trains and validates on, written down for other trainers."""

import hashlib
from pathlib import Path

import numpy as np
import torch

from benchmarks.random_rows import collect_first_rows
from smoltrain.config.schema import Config
from smoltrain.data.rows.open_loader import open_loader
from smoltrain.data.tokens.prepare import prepare_run_data

ROWS_FILE, VALIDATION_FILE = "rows.npy", "validation.npy"


def write_real_rows(config: Config, steps: int, rows_per_step: int, folder: Path) -> dict[str, str]:
    """Write the rows of the first steps, and those that are validated on; the SHA-256 of either, by file name.

    Errors: UserError for the data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        ROWS_FILE: collect_first_rows(config, steps, rows_per_step),
        VALIDATION_FILE: collect_validation_rows(config, rows_per_step),
    }
    for name, array in arrays.items():
        np.save(folder / name, array)
    return {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}


def collect_validation_rows(config: Config, rows_per_step: int) -> np.ndarray:
    """The rows of each evaluation, int32 (at most evaluate.rows, T + 1), without those that fill up the last batch."""
    prepare_run_data(config, rows_per_step, 1)
    accumulation = rows_per_step // config.batch.micro_batch_rows
    loader = open_loader(config, 0, 1, rows_per_step=rows_per_step, accumulation=accumulation)
    batches = loader.validation_batches(config.evaluate.rows)
    loader.close()
    return torch.cat([batch.ids_BS[: batch.num_labelled] for batch in batches]).numpy()
