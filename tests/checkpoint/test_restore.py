"""A restored run goes on as if it had never stopped, on as many ranks or on others."""

from pathlib import Path
from typing import Any

import pytest
import torch

from smoltrain.config.schema import Config
from smoltrain.data.tokens.prepare import prepare_run_data
from tests import tiny
from tests.checkpoint.saving import FACTS, restore, run_steps, save_steps, saver_of, trained


def losses_after(settings: Config, restored_from: int | None) -> tuple[list[float], dict[str, torch.Tensor], str]:
    """Losses of steps 4 to 6 and what they lead to, either straight through or by way of the disk."""
    writer = None
    if restored_from is None:
        wrapped, loader, plan = trained(settings, 3)
        writer = saver_of(settings, plan)
        writer.start_save(3, wrapped, loader, **FACTS)  # and the next steps are trained while it is written
    else:
        wrapped, loader, plan = trained(settings, 1)
        restore(settings, restored_from, wrapped, loader)
    losses = run_steps(range(4, 7), settings, wrapped, loader)
    if writer:
        writer.finish()
    return losses, wrapped.weights(keep=True), loader.ledger


@pytest.mark.parametrize(
    ("stage", "by"),
    [*[(2, "step"), (2, "micro_batch")], *(pytest.param(stage, "auto", marks=pytest.mark.slow) for stage in (1, 3))],
)
def test_a_restored_run_goes_on_bitwise_with_dropout(tmp_path: Path, ranks: Any, stage: int, by: str) -> None:
    words = (f"engine.ds_config=zero{stage}", "engine.precision=bf16", f"engine.reduce_gradients={by}")
    settings = tiny.load(tmp_path, *words, "model.dropout=0.1")
    prepare_run_data(settings)
    straight = ranks(2).run(losses_after, settings, None)
    resumed = ranks(2).run(losses_after, settings, 3)
    for (losses, weights, ledger), (losses_again, weights_again, ledger_again) in zip(straight, resumed, strict=True):
        assert losses == losses_again
        assert ledger == ledger_again
        assert all(torch.equal(weights[name], weights_again[name]) for name in weights)


def test_another_number_of_ranks_goes_on_with_the_same_rows(tmp_path: Path, ranks: Any) -> None:
    settings = tiny.load(tmp_path, "engine.ds_config=zero2", "engine.precision=bf16")
    prepare_run_data(settings)
    (losses, _, ledger), *_ = ranks(2).run(losses_after, settings, None)
    [(losses_again, _, ledger_again)] = ranks(1).run(losses_after, settings, 3)
    assert losses_again == pytest.approx(losses, rel=1e-3)
    assert ledger_again == ledger


def random_numbers(settings: Config, step: int) -> list[float]:
    """What dropout on this rank would draw after this step was restored."""
    wrapped, loader, _ = trained(settings, 0)
    restore(settings, step, wrapped, loader)
    return torch.rand(3).tolist()


def test_random_numbers_begin_afresh_on_another_number_of_ranks(settings: Config, ranks: Any) -> None:
    ranks(1).run(save_steps, settings, [3, 4], 2)
    first, second = ranks(2).run(random_numbers, settings, 3)
    assert first != second, "each rank drops other units"
    assert ranks(2).run(random_numbers, settings, 3) == [first, second], "the same start draws the same numbers"
    assert not {*first, *second} & {*ranks(2).run(random_numbers, settings, 4)[0]}, "another step draws others"
