"""Metrics of the data: what is known without asking the other ranks."""

from types import SimpleNamespace
from typing import Any

from smoltrain.training.data_metrics import data_metrics

NUMBERS = {
    "rows_consumed": 24, "targets_consumed": 380, "unique_rows": 16, "unique_documents": 5, "repeat_factor": 1.5,
    "bad_records": 1, "ledger": "ab",
}  # fmt: skip


def loader(epochs: float | None, **targets: int) -> Any:
    return SimpleNamespace(**NUMBERS, epochs=epochs, sources=tuple(targets), source_targets=list(targets.values()))


def test_each_metric_has_its_number_and_epochs_where_they_are_known() -> None:
    metrics = data_metrics(loader(0.5, data=380))
    assert metrics == {
        "data/rows": 24, "data/tokens": 380, "data/unique_rows": 16, "data/unique_documents": 5,
        "data/repeat_factor": 1.5, "data/bad_records": 1, "data/ledger": "ab", "data/epochs": 0.5,
    }  # fmt: skip
    assert "data/epochs" not in data_metrics(loader(None, data=380))


def test_several_sources_are_told_one_by_one() -> None:
    metrics = data_metrics(loader(None, web=300, books=80))
    assert metrics["data/tokens_by_source/web"] == 300
    assert metrics["data/tokens_by_source/books"] == 80
