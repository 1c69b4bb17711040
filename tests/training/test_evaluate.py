"""The validation loss: the same tokens on any number of ranks, and cut short by a stop."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from smoltrain.config.schema import Config
from tests.engine.test_engine import fresh_model, loader_of
from tests.ranks import world
from tests.sessions import bare_session
from tests.training.test_step import engine_for, prepared


def validation_loss(settings: Config, rows: int) -> tuple[float, float, float, float]:
    """The engine's validation loss and the same by hand over all rows on one rank; then both in bits per byte."""
    from smoltrain.training.evaluate import evaluate_loss

    wrapped, here = engine_for(settings, "fp32"), world()
    loader = loader_of(settings, here.rank, here.size)
    bytes_per_id = torch.from_numpy(loader.prepared.bytes_per_id())
    found = evaluate_loss(bare_session(settings, wrapped, loader), loader.validation_batches(rows), bytes_per_id)
    assert found is not None
    ours, bits = found
    net, total, count, num_bytes = fresh_model(settings).eval(), 0.0, 0, 0
    with torch.no_grad():
        for batch in loader_of(settings, 0, 1).validation_batches(rows):
            total += float(net(batch.ids_BT, batch.labels_BT))
            valid = batch.labels_BT[batch.labels_BT != -100].tolist()
            count += len(valid)
            num_bytes += sum(len(loader.prepared.tokenizer.decode([i]).encode()) for i in valid if i != 0)
    return ours, total / count, bits, total / math.log(2) / num_bytes


@pytest.mark.parametrize("rows", [1, 7, 8])
def test_validation_loss_is_the_mean_over_the_same_tokens_on_any_world(tmp_path: Path, ranks: Any, rows: int) -> None:
    settings = prepared(tmp_path, "engine.precision=fp32", "model.dropout=0.2")
    for ours, by_hand, bits, bits_by_hand in ranks(2).run(validation_loss, settings, rows):
        assert ours == pytest.approx(by_hand, rel=1e-6)
        assert bits == pytest.approx(bits_by_hand, rel=1e-6)


def evaluation_with_a_stop(settings: Config) -> tuple[Any, list[str]]:
    """Rank 1 is asked to stop once its second batch is due."""
    from smoltrain.training.evaluate import evaluate_loss

    wrapped, here = engine_for(settings, "fp32"), world()
    loader = loader_of(settings, here.rank, here.size)
    batches, bytes_per_id = loader.validation_batches(12), torch.from_numpy(loader.prepared.bytes_per_id())
    assert len(batches) == 3
    session = bare_session(settings, wrapped, loader, stop=lambda: here.rank == 1 and len(marks) == 2)
    marks = session.watchdog.places
    return evaluate_loss(session, batches, bytes_per_id), marks


def test_a_signal_ends_an_evaluation(tmp_path: Path, ranks: Any) -> None:
    settings = prepared(tmp_path, "engine.ds_config=zero3", "engine.precision=fp32")
    assert ranks(2).run(evaluation_with_a_stop, settings) == [(None, ["evaluation"] * 2)] * 2
