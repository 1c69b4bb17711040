"""The loop itself, on two real ranks in this session: skips, resets, phases, evaluation."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from smoltrain.config.schema import Config
from smoltrain.data.documents.retry import ReaderHealth
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.errors import Problem, TrainingStopped, UserError
from smoltrain.schedule import Plan
from tests import tiny
from tests.engine.test_engine import fresh_model, loader_of
from tests.ranks import world


def engine_for(settings: Config, precision: str) -> Any:
    from smoltrain.engine.engine import build_engine

    return build_engine(fresh_model(settings), settings, world(), precision=precision, accumulation=2)


def prepared(tmp_path: Path, *overrides: str) -> Config:
    settings = tiny.load(tmp_path, *overrides)
    prepare_run_data(settings)
    return settings


def spoil(wrapped: Any, rank: int, calls: list[int]) -> None:
    """Make the gradient of one parameter infinite on one rank, for the first of its backward passes."""

    def infinite(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return torch.full_like(gradient, torch.inf) if len(calls) == 1 else gradient

    if world().rank == rank:
        wrapped.module.norm.weight.register_hook(infinite)


def step_with_a_bad_gradient(settings: Config, precision: str) -> dict[str, Any]:
    from smoltrain.train.step import train_step

    wrapped, here = engine_for(settings, precision), world()
    loader, plan = loader_of(settings, here.rank, here.size), Plan(settings.phases)
    before = wrapped.weights(keep=True)
    spoil(wrapped, 1, [])
    first = train_step(1, wrapped, loader, plan, here)
    assert first is not None
    return {
        "skipped": first.num_skipped,
        "rows": loader.rows_consumed,
        "norm": first.metrics["train/grad_norm_before_clipping"],
        "finite": all(bool(torch.isfinite(w).all()) for w in wrapped.weights(keep=True).values()),
        "moved": any(not torch.equal(w, before[name]) for name, w in wrapped.weights(keep=True).items()),
    }


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
)
def test_a_non_finite_gradient_is_skipped_and_counted_never_as_a_step(
    tmp_path: Path, ranks: Any, stage: int, precision: str
) -> None:
    settings = prepared(tmp_path, f"engine.ds_config=zero{stage}", f"engine.precision={precision}")
    for seen in ranks(2).run(step_with_a_bad_gradient, settings, precision):
        assert seen["skipped"] == 1
        assert seen["rows"] == 2 * 8, "the spoilt rows are spent, the step took the next ones"
        assert math.isfinite(seen["norm"])
        assert seen["finite"]
        assert seen["moved"]


def first_step_of_a_phase(settings: Config, reset: bool) -> float:
    """How far one update with lr 1e-3 moves the weights furthest, after 8 steps of another phase."""
    from smoltrain.train.step import train_step

    wrapped, here, plan = engine_for(settings, "fp32"), world(), Plan(settings.phases)
    loader = loader_of(settings, here.rank, here.size)
    for step in range(1, 9):
        train_step(step, wrapped, loader, plan, here)
    before = wrapped.weights(keep=True)
    assert plan.resets_optimizer(9) == reset
    train_step(9, wrapped, loader, plan, here)
    moved = [(w - before[name]).abs() for name, w in wrapped.weights(keep=True).items()]
    return float(torch.cat([m.flatten() for m in moved]).median())


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_phase_may_reset_the_optimizer_or_keep_it(tmp_path: Path, ranks: Any, stage: int) -> None:
    shape = (f"engine.ds_config=zero{stage}", "engine.precision=fp32", "optimizer.gradient_clipping=0")
    phase = ("phases.continuation.lr=1e-3", "phases.continuation.weight_decay=0")
    medians = {}
    for reset in (True, False):
        mode = "reset" if reset else "keep"
        settings = prepared(tmp_path / mode, *shape, *phase, f"phases.continuation.optimizer_state={mode}")
        medians[reset] = ranks(2).run(first_step_of_a_phase, settings, reset)[0]
    # AdamW's very first update moves each weight by lr x sign(gradient) (Kingma & Ba 2015, section 2.1).
    assert medians[True] == pytest.approx(1e-3, rel=1e-3)
    assert medians[False] < 0.9e-3


def endless_skips(settings: Config) -> str:
    from smoltrain.train import step
    from smoltrain.train.step import train_step

    wrapped, here = engine_for(settings, "bf16"), world()
    wrapped.module.norm.weight.register_hook(lambda g: torch.full_like(g, torch.inf))
    step.MAX_SKIPS_IN_A_ROW = 3
    try:
        train_step(1, wrapped, loader_of(settings, here.rank, here.size), Plan(settings.phases), here)
    except TrainingStopped as error:
        return str(error)
    finally:
        step.MAX_SKIPS_IN_A_ROW = 50
    return "went on"


def test_endless_skips_stop_the_run(tmp_path: Path, ranks: Any) -> None:
    settings = prepared(tmp_path)
    for message in ranks(2).run(endless_skips, settings):
        assert "step 1: 3 updates in a row had a gradient that is not finite" in message


def validation_loss(settings: Config, rows: int) -> tuple[float, float, float, float]:
    """The engine's validation loss and the same by hand over all rows on one rank; then both in bits per byte."""
    from smoltrain.train.evaluate import evaluate_loss

    wrapped, here = engine_for(settings, "fp32"), world()
    loader = loader_of(settings, here.rank, here.size)
    bytes_per_id = torch.from_numpy(loader.prepared.bytes_per_id())
    found = evaluate_loss(wrapped, loader.validation_batches(rows), bytes_per_id, here)
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
    from smoltrain.train.evaluate import evaluate_loss

    wrapped, here, marks = engine_for(settings, "fp32"), world(), []
    loader = loader_of(settings, here.rank, here.size)
    batches, bytes_per_id = loader.validation_batches(12), torch.from_numpy(loader.prepared.bytes_per_id())
    assert len(batches) == 3
    return evaluate_loss(
        wrapped, batches, bytes_per_id, here, stop=lambda: here.rank == 1 and len(marks) == 2, mark=marks.append
    ), marks


def test_a_signal_ends_an_evaluation(tmp_path: Path, ranks: Any) -> None:
    settings = prepared(tmp_path, "engine.ds_config=zero3", "engine.precision=fp32")
    assert ranks(2).run(evaluation_with_a_stop, settings) == [(None, ["evaluation"] * 2)] * 2


def marks_of_a_step(settings: Config) -> list[str]:
    from smoltrain.train.step import train_step

    wrapped, here, marks = engine_for(settings, "fp32"), world(), []
    train_step(1, wrapped, loader_of(settings, here.rank, here.size), Plan(settings.phases), here, 1, mark=marks.append)
    return marks


def test_a_step_marks_where_it_is(tmp_path: Path, ranks: Any) -> None:
    settings = prepared(tmp_path)
    micro_batch = ["forward", "backward"]
    step = ["data", "reduction", *micro_batch * 2, "reduction", "gradients", "update"]
    assert ranks(2).run(marks_of_a_step, settings) == [step] * 2


def stopped_after_a_skip(settings: Config) -> dict[str, Any]:
    """A first step whose rows are passed over, and then a stop while the next rows do not come."""
    from smoltrain.config.schema import SpikesSection
    from smoltrain.train import step
    from smoltrain.train.spikes import SpikeGuard
    from smoltrain.train.step import train_step

    wrapped, here, spent = engine_for(settings, "fp32"), world(), []
    loader = loader_of(settings, here.rank, here.size)
    digests = loader.unpack_totals(here.sum_ints(*loader.fetch_step_rows().counts)).digests
    ready, step.WAIT_S = loader.wait_until_ready, 0.0
    loader.wait_until_ready = lambda timeout_s: loader.rows_consumed == 0 and ready(timeout_s)
    guard = SpikeGuard(SpikesSection(), here, None, [{"does": "rewind", "rows": [0, 8]}])
    try:
        result = train_step(
            1, wrapped, loader, Plan(settings.phases), here, guard=guard, stop=lambda: True, spent=spent.append
        )
    finally:
        step.WAIT_S = 5.0
    return {"result": result, "spent": spent[0].tolist(), "wanted": digests.tolist(), "rows": loader.rows_consumed}


def test_rows_that_were_spent_before_a_stop_are_not_lost_to_the_ledger(tmp_path: Path, ranks: Any) -> None:
    for seen in ranks(2).run(stopped_after_a_skip, prepared(tmp_path)):
        assert seen["result"] is None
        assert seen["rows"] == 8
        assert seen["spent"] == seen["wanted"]


def samples(settings: Config, stage: int) -> list[tuple[str, str]]:
    from smoltrain.train.run import sample_prompts

    wrapped, here = engine_for(settings, "fp32"), world()
    assert wrapped.stage == stage
    state = torch.get_rng_state()
    tokenizer = loader_of(settings, here.rank, here.size).prepared.tokenizer
    texts = sample_prompts(wrapped, tokenizer, settings, here)
    assert sample_prompts(wrapped, tokenizer, settings, here, stop=lambda: here.rank == 1) == []
    assert torch.equal(state, torch.get_rng_state()), "sampling must not touch the training's random numbers"
    assert wrapped.module.training
    return texts


def test_every_rank_samples_the_same_text_even_with_partitioned_weights(tmp_path: Path, ranks: Any) -> None:
    texts = []
    for stage in (2, 3):
        settings = prepared(tmp_path, f"engine.ds_config=zero{stage}", "engine.precision=fp32")
        texts += ranks(2).run(samples, settings, stage)
    assert all(text == texts[0] for text in texts)
    assert len(texts[0]) == 2


class Slow:
    """A loader whose rows come at the third asking on one rank, or never."""

    def __init__(self, rank: int, error: UserError | None = None) -> None:
        self.health, self._asked, self._rank, self._error = ReaderHealth(), 0, rank, error

    def wait_until_ready(self, timeout_s: float) -> bool:
        self._asked += 1
        if world().rank == self._rank and self._error:
            raise self._error
        return world().rank != self._rank or self._asked >= 3


def waiting(rank: int, error: UserError | None, stop: bool) -> tuple[Any, list[str]]:
    """What a rank gets, and what it says, while another one waits for its data."""
    from smoltrain.train import step
    from smoltrain.train.step import wait_for_rows

    said: list[str] = []
    step.SAY_S = 0.0
    try:
        loader: Any = Slow(rank, error)
        got: Any = wait_for_rows(loader, world(), lambda: stop and world().rank == 0, said.append)
    except UserError as raised:
        got = str(raised)
    finally:
        step.SAY_S = 30.0
    return got, said


def test_ranks_wait_for_each_others_rows_and_say_so(ranks: Any) -> None:
    for seconds, said in ranks(2).run(waiting, 1, None, False):
        assert seconds >= 0
        assert said == ["rank 1 waits for data: rows"] * 2


def test_a_rank_that_cannot_have_its_rows_stops_all(ranks: Any) -> None:
    error = UserError(Problem("the shard is gone", "404", "it", "data.path"))
    results = ranks(2).run(waiting, 1, error, False)
    assert [got for got, _ in results] == ["the shard is gone: saw 404, want it; change data.path"] * 2


def test_a_signal_ends_the_waiting(ranks: Any) -> None:
    assert [got for got, _ in ranks(2).run(waiting, 1, None, True)] == [None, None]
