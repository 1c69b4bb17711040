"""Metrics of how far a run has come through its data."""

from smoltrain.data.rows.loader import Loader
from smoltrain.run.track import SOURCE_TOKENS_PREFIX


def data_metrics(loader: Loader) -> dict[str, float | str]:
    """The metrics below data/ that every step has, the same on every rank; nothing is exchanged for them."""
    metrics: dict[str, float | str] = {
        "data/rows": loader.rows_consumed,
        "data/tokens": loader.targets_consumed,
        "data/unique_rows": loader.unique_rows,
        "data/unique_documents": loader.unique_documents,
        "data/repeat_factor": loader.repeat_factor,
        "data/bad_records": loader.bad_records,
        "data/ledger": loader.ledger,
    }
    if loader.epochs is not None:
        metrics["data/epochs"] = loader.epochs
    if len(loader.sources) > 1:
        for name, num_targets in zip(loader.sources, loader.source_targets, strict=True):
            metrics[SOURCE_TOKENS_PREFIX + name] = num_targets
    return metrics
