"""Rows of random ids."""

from pathlib import Path

import numpy as np

from benchmarks.random_rows import collect_first_rows, random_rows_overrides, write_random_rows
from smoltrain.config.load import load_config
from tests import tiny


def test_rows_are_dealt_as_training_deals_them_on_any_number_of_ranks(tmp_path: Path):
    write_random_rows(tmp_path / "data", 320, 3000, 16)
    words = tiny.words(tmp_path, *random_rows_overrides(tmp_path / "data"))
    dealt = {}
    for micro_batch in (1, 4):
        run = [
            f"run.name=of-{micro_batch}",
            f"batch.micro_batch={micro_batch}",
            f"batch.accumulation={4 // micro_batch}",
        ]
        dealt[micro_batch] = collect_first_rows(load_config("quickstart", [*words, *run]), 6, 4)
    assert np.array_equal(dealt[1], dealt[4])
    assert dealt[1].shape == (24, 17)
    ids, counts = np.unique(dealt[1], return_counts=True)
    assert 0 <= ids.min() < 3
    assert 100 < ids.max() < 320
    assert counts[ids < 20].sum() > counts[ids >= 20].sum(), "skewed: a trainer has something to learn"
