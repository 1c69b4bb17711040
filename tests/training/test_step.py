"""The step itself, on two real ranks in this session: skips, resets, stops, and how often the ranks talk."""

import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from smoltrain.config.schema import Config
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.errors import TrainingStopped
from smoltrain.run.run_folder import SPIKES_FILE
from smoltrain.schedule import Plan
from smoltrain.training.spikes import read_spikes
from smoltrain.training.taken_rows import WAIT_S
from tests import tiny
from tests.collective_bytes import CollectiveBytes
from tests.engines import fresh_model, loader_of, masked_engine, whole_state
from tests.ranks import world
from tests.sessions import bare_session, train_steps

# ZeRO stage, precision and who reduces: DeepSpeed (micro_batch) everywhere, and we (step) where that is possible.
BOTH_WAYS = [
    (0, "fp32", "micro_batch"), (1, "fp32", "micro_batch"), (1, "fp32", "step"), (1, "bf16", "micro_batch"),
    (2, "fp32", "micro_batch"), (2, "fp32", "step"), (2, "bf16", "micro_batch"), (2, "bf16", "step"),
    (3, "fp32", "micro_batch"), (3, "bf16", "micro_batch"),
]  # fmt: skip


def engine_for(settings: Config, precision: str) -> Any:
    from smoltrain.engine.build_engine import build_engine

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
    wrapped, here = engine_for(settings, precision), world()
    loader = loader_of(settings, here.rank, here.size)
    before = wrapped.weights(keep=True)
    spoil(wrapped, 1, [])
    [first] = train_steps(range(1, 2), bare_session(settings, wrapped, loader))
    return {
        "reduction": wrapped.reduction,
        "host wait": wrapped.host_wait,
        "skipped": first.num_skipped,
        "rows": loader.rows_consumed,
        "norm": first.metrics["train/grad_norm_before_clipping"],
        "finite": all(bool(torch.isfinite(w).all()) for w in wrapped.weights(keep=True).values()),
        "moved": any(not torch.equal(w, before[name]) for name, w in wrapped.weights(keep=True).items()),
    }


@pytest.mark.parametrize(("stage", "precision", "reduce"), BOTH_WAYS)
def test_a_non_finite_gradient_is_skipped_and_counted_never_as_a_step(
    tmp_path: Path, ranks: Any, stage: int, precision: str, reduce: str
) -> None:
    words = (f"engine.ds_config=zero{stage}", f"engine.precision={precision}", f"engine.reduce_gradients={reduce}")
    settings = prepared(tmp_path, *words)
    for seen in ranks(2).run(step_with_a_bad_gradient, settings, precision):
        assert ("DeepSpeed" in seen["reduction"]) == (reduce == "micro_batch"), seen["reduction"]
        waits_for_deepspeed = seen["host wait"] == "DeepSpeed asks it for the norm of the gradient"
        assert waits_for_deepspeed == (reduce == "micro_batch")
        if reduce == "step":
            assert seen["host wait"] == "the step of AdamW that runs here cannot be masked", "torch's plain one"
        assert seen["skipped"] == 1
        assert seen["rows"] == 2 * 8, "the spoilt rows are spent, the step took the next ones"
        assert math.isfinite(seen["norm"])
        assert seen["finite"]
        assert seen["moved"]


def first_step_of_a_phase(settings: Config, reset: bool) -> float:
    """How far one update with lr 1e-3 moves the weights furthest, after 8 steps of another phase."""
    wrapped, here, plan = engine_for(settings, "fp32"), world(), Plan(settings.phases)
    session = bare_session(settings, wrapped, loader_of(settings, here.rank, here.size))
    train_steps(range(1, 9), session)
    before = wrapped.weights(keep=True)
    assert plan.resets_optimizer(9) == reset
    train_steps(range(9, 10), session)
    moved = [(w - before[name]).abs() for name, w in wrapped.weights(keep=True).items()]
    return float(torch.cat([m.flatten() for m in moved]).median())


@pytest.mark.parametrize(
    ("stage", "reduce"),
    [
        *[(2, "step"), (2, "micro_batch")],
        *(pytest.param(stage, "micro_batch", marks=pytest.mark.slow) for stage in (0, 3)),
    ],
)
def test_a_phase_may_reset_the_optimizer_or_keep_it(tmp_path: Path, ranks: Any, stage: int, reduce: str) -> None:
    shape = (
        f"engine.ds_config=zero{stage}", f"engine.reduce_gradients={reduce}", "engine.precision=fp32",
        "optimizer.gradient_clipping=0",
    )  # fmt: skip
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
    from smoltrain.training import bad_steps

    wrapped, here = engine_for(settings, "bf16"), world()
    wrapped.module.norm.weight.register_hook(lambda g: torch.full_like(g, torch.inf))
    bad_steps.MAX_SKIPS_IN_A_ROW = 3
    try:
        loader = loader_of(settings, here.rank, here.size)
        train_steps(range(1, 2), bare_session(settings, wrapped, loader, journal=settings.run_folder / SPIKES_FILE))
    except TrainingStopped as error:
        return str(error)
    finally:
        bad_steps.MAX_SKIPS_IN_A_ROW = 50
    return "went on"


@pytest.mark.parametrize("reduce", ["step", "micro_batch"])
def test_endless_skips_stop_the_run(tmp_path: Path, ranks: Any, reduce: str) -> None:
    settings = prepared(tmp_path, f"engine.reduce_gradients={reduce}")
    for message in ranks(2).run(endless_skips, settings):
        assert "step 1: 3 updates in a row had a gradient that is not finite" in message
    [line] = read_spikes(settings.run_folder)
    assert (line["step"], line["does"]) == (1, "stop")
    assert line["why"] == "3 updates in a row had a gradient that is not finite"
    rows = settings.batch.rows(2)
    assert line["rows"] == [2 * rows, 3 * rows], "of the third"


def marks_of_a_step(settings: Config) -> list[str]:
    wrapped, here = engine_for(settings, "fp32"), world()
    session = bare_session(settings, wrapped, loader_of(settings, here.rank, here.size))
    train_steps(range(1, 2), session)
    return session.watchdog.places


def test_a_step_marks_where_it_is(tmp_path: Path, ranks: Any) -> None:
    settings = prepared(tmp_path)
    micro_batch = ["forward", "backward"]
    step = ["data", "reduction", *micro_batch * 2, "reduction", "gradients", "update"]
    assert ranks(2).run(marks_of_a_step, settings) == [step] * 2


def stopped_after_a_skip(settings: Config) -> dict[str, Any]:
    """A first step whose rows are passed over, and then a stop while the next rows do not come."""
    from smoltrain.config.schema import SpikesSection
    from smoltrain.training import after_step, taken_rows
    from smoltrain.training.spikes import SpikeGuard

    wrapped, here = engine_for(settings, "fp32"), world()
    loader = loader_of(settings, here.rank, here.size)
    digests = loader.unpack_totals(here.sum_ints(*loader.fetch_step_rows().counts)).digests
    ready, wait_s = loader.wait_until_ready, taken_rows.WAIT_S
    loader.wait_until_ready = lambda timeout_s: loader.rows_consumed == 0 and ready(timeout_s)
    guard = SpikeGuard(SpikesSection(), here, None, [{"does": "rewind", "rows": [0, 8]}])
    session = bare_session(settings, wrapped, loader, guard=guard, stop=lambda: loader.rows_consumed > 0)
    taken_rows.WAIT_S = 0.0
    try:
        [result] = train_steps(range(1, 2), session)
    finally:
        taken_rows.WAIT_S = wait_s
    after_step.record_rows(session, result)
    return {
        "stopped": result.stopped, "digests": result.digests.tolist(), "wanted": digests.tolist(),
        "rows": loader.rows_consumed, "skipped": session.num_skipped,
    }  # fmt: skip


def test_rows_that_were_spent_before_a_stop_are_not_lost_to_the_ledger_or_the_count_of_skips(
    tmp_path: Path, ranks: Any
) -> None:
    for seen in ranks(2).run(stopped_after_a_skip, prepared(tmp_path)):
        assert seen["stopped"]
        assert (seen["rows"], seen["skipped"]) == (8, 1)
        assert seen["digests"] == seen["wanted"]


def stop_while_data_are_out_of_reach(settings: Config, asked: int) -> dict[str, Any]:
    """A step whose rows never come on any rank, and a stop on rank 1 alone at the so manieth time it is asked for."""
    wrapped, here = engine_for(settings, "fp32"), world()
    loader = loader_of(settings, here.rank, here.size)
    before = wrapped.weights(keep=True)
    looks_s: list[float] = []
    looks_when_stopped: list[int] = []
    questions = 0

    def never(timeout_s: float) -> bool:
        looks_s.append(timeout_s)
        time.sleep(timeout_s)
        return False

    def is_asked() -> bool:
        nonlocal questions
        questions += 1
        if here.rank == 0 or questions < asked:
            return False
        looks_when_stopped.append(len(looks_s))
        return True

    loader.wait_until_ready = never
    session = bare_session(settings, wrapped, loader, stop=is_asked)
    [result] = train_steps(range(1, 2), session)
    return {
        "looks_s": looks_s, "looks_when_stopped": looks_when_stopped,
        "stopped": result.stopped, "waited": result.waited_for_data,
        "unmoved": all(torch.equal(w, before[name]) for name, w in wrapped.weights(keep=True).items()),
    }  # fmt: skip


def test_a_stop_never_waits_for_data(tmp_path: Path, ranks: Any) -> None:
    """Neither one that was there before the step, nor one that comes to a single rank while all of them wait."""
    settings = prepared(tmp_path)
    for asked in (1, 9):
        other, stopping = ranks(2).run(stop_while_data_are_out_of_reach, settings, asked)
        for seen in (other, stopping):
            assert (seen["stopped"], seen["unmoved"], seen["waited"]) == (True, True, asked == 9)
        assert set(stopping["looks_when_stopped"]) == {len(stopping["looks_s"])}, "it does not look again"
        if asked == 1:
            assert sum(other["looks_s"]) <= WAIT_S, "once, until the ranks tell each other how they stand"


# ---- how often the ranks talk


def host_collectives(settings: Config, several_hosts: bool) -> tuple[dict[str, int], float, dict[str, Any]]:
    """(how often host numbers were exchanged in a step, bytes that this rank sent in it, its metrics).

    By method of World; barriers of shared memory apart. Rank r is said to be in collectives for 1 + 2r seconds a step.
    """
    from smoltrain.distributed.communication import StepCommunication
    from smoltrain.distributed.world import World
    from smoltrain.engine import shared_tensor

    counts: Counter[str] = Counter()
    handed_over = CollectiveBytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepCommunication, "seconds", lambda _: 1.0 + 2 * world().rank)
        if several_hosts:
            patch.setattr(shared_tensor, "_map_shared_memory", lambda *_: [])
        wrapped, here = engine_for(settings, settings.engine.precision), world()
        session = bare_session(settings, wrapped, loader_of(settings, here.rank, here.size))
        train_steps(range(1, 3), session)
        for name in (
            "sum_ints",
            "sum_floats",
            "max_floats",
            "gather_numbers",
            "gather",
            "barrier",
            "run_on_first_rank",
        ):
            real = getattr(World, name)

            def counted(*args: Any, real: Any = real, name: str = name, **more: Any) -> Any:
                counts[name] += 1
                return real(*args, **more)

            patch.setattr(World, name, counted)
        with handed_over:
            [result] = train_steps(range(3, 4), session)  # in which nothing is due
    counts["sum_ints"] -= counts["barrier"]  # which is one
    return {name: num for name, num in counts.items() if num}, handed_over.sent(2), result.metrics


@pytest.mark.parametrize(("stage", "precision", "reduce"), BOTH_WAYS)
def test_ranks_exchange_host_numbers_twice_a_step_and_all_that_is_sent_is_counted(
    tmp_path: Path, ranks: Any, stage: int, precision: str, reduce: str
) -> None:
    words = (f"engine.ds_config=zero{stage}", f"engine.precision={precision}", f"engine.reduce_gradients={reduce}")
    settings = prepared(tmp_path, *words)
    for counts, sent, metrics in ranks(2).run(host_collectives, settings, True):
        assert counts == {"sum_ints": 1, "gather_numbers": 1}
        assert metrics["speed/communication_mb"] == sent / 1e6 > 0, "bytes as torch dispatches them, DeepSpeed's too"
        assert metrics["speed/communication_s"] == 1.0, "the rank that was there shortest"
        assert metrics["speed/rank_wait_s"] == (1.0 + 3.0) / 2 - 1.0
    if reduce == "step":
        for counts, sent, metrics in ranks(2).run(host_collectives, settings, False):
            barriers = counts.pop("barrier")
            assert counts == {"sum_ints": 1, "gather_numbers": 1}
            assert metrics["speed/communication_mb"] == sent / 1e6 < 0.01, "shared memory sends nothing"
            assert barriers <= 4, "on one machine, around the reads of two parameter groups in shared memory"


# ---- what the device does, and when the host reads of it


def story_of_steps(settings: Config, masked_by: str, late: bool) -> dict[str, Any]:
    """Six steps: the third has a loss that is not finite on the last rank, the fifth such a gradient on rank 0."""
    from smoltrain.config.schema import SpikesSection
    from smoltrain.kernels.device_numbers import ReturningNumbers
    from smoltrain.training import step as step_module
    from smoltrain.training.spikes import SpikeGuard

    here = world()
    events: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        engine = masked_engine(settings, masked_by, patch)
        loader = loader_of(settings, here.rank, here.size)
        rows = loader.layout.rows_per_step
        forward, read, begin = engine.forward, ReturningNumbers.read, step_module.start_update

        def poisoned(batch: Any) -> torch.Tensor:
            events.append("forward")
            bad = here.rank == here.size - 1 and loader.rows_consumed == 2 * rows and torch.is_grad_enabled()
            return forward(batch) * (math.nan if bad else 1.0)

        def infinite(gradient: torch.Tensor) -> torch.Tensor:
            return gradient * (math.inf if here.rank == 0 and loader.rows_consumed == 5 * rows else 1.0)

        def noted_read(numbers: Any) -> list[float]:
            events.append("read")
            return read(numbers)

        def noted_update(step: int, *others: Any) -> Any:
            events.append(f"update {step}")
            return begin(step, *others)

        engine.forward = poisoned
        engine.module.norm.weight.register_hook(infinite)
        patch.setattr(ReturningNumbers, "read", noted_read)
        patch.setattr(step_module, "start_update", noted_update)
        guard = SpikeGuard(SpikesSection(on_spike="skip"), here, settings.run_folder / SPIKES_FILE)
        session = bare_session(settings, engine, loader, guard=guard, reads_late=late)
        results = []
        for step, result in step_module.train_steps(range(1, 7), session, lambda step: step == 4):
            events.append(f"done {step}")
            results.append(result)
    keys = ("train/loss_nats_per_token", "train/grad_norm_before_clipping", "train/lr", "data/rows", "data/ledger")
    return {
        "metrics": [[result.metrics[key] for key in keys] for result in results],
        "digests": [result.digests.tolist() for result in results],
        "skipped": [result.num_skipped for result in results],
        "state": whole_state(engine), "said": session.tracker.said, "history": list(guard._history),
        "events": events, "rows": loader.rows_consumed, "global steps": engine._deepspeed.global_steps,
    }  # fmt: skip


PASSES = ["forward", "forward"]
READ_LATE = [
    *PASSES, "update 1",
    *PASSES, "read", "done 1", "update 2",
    *PASSES, "read", "done 2", "update 3",
    *PASSES, "read", *["forward"] * 4, "update 3",  # a spike: each row is looked at; what is under way is the next try
    *PASSES, "read", "done 3", "update 4", "read", "done 4",  # which is awaited
    *PASSES, "update 5",
    *PASSES, "read", "update 5",  # its gradient was not finite
    *PASSES, "read", "done 5", "update 6", "read", "done 6",  # the last one
]  # fmt: skip


@pytest.mark.parametrize(
    ("size", "masked_by", "precision", "kind"),
    [
        (2, "own step", "bf16", "muon"),  # whose tables and vectors are AdamW's
        *(
            pytest.param(*cell, marks=pytest.mark.slow)
            for cell in (
                (1, "own step", "fp32", "muon"),
                (2, "own step", "fp32", "adamw"),
                (1, "one pass", "bf16", "muon"),
                (2, "one pass", "bf16", "adamw"),
                (2, "one pass", "fp32", "muon"),
            )
        ),
    ],
)
def test_a_host_that_reads_a_step_later_trains_the_same_to_the_bit(
    tmp_path: Path, ranks: Any, size: int, masked_by: str, precision: str, kind: str
) -> None:
    words = (f"engine.precision={precision}", f"optimizer.kind={kind}", "track.gradients_every=0")
    settings = prepared(tmp_path, "engine.reduce_gradients=step", *words)
    at_once = ranks(size).run(story_of_steps, settings, masked_by, False)
    late = ranks(size).run(story_of_steps, settings, masked_by, True)
    for theirs, ours in zip(at_once, late, strict=True):
        assert theirs.pop("events")[:5] == [*PASSES, "update 1", "read", "done 1"]
        assert ours.pop("events") == READ_LATE
        assert ours == theirs
        assert ours["skipped"] == [0, 0, 1, 0, 1, 0]
        assert (ours["rows"], ours["global steps"]) == (8 * 4 * size, 6)
        assert len(ours["said"]) > 0
    assert late[0]["state"] == late[-1]["state"]


ORTHOGONALIZING = 3 * 5 * 3 + 4 * 5  # of three pairs of sides five iterations of three products, of four shapes a few
MOST_KERNELS = {
    ("one pass", "adamw"): 36, ("one pass", "muon"): 45 + ORTHOGONALIZING,
    ("own step", "adamw"): 46, ("own step", "muon"): 61 + ORTHOGONALIZING,
}  # fmt: skip


def ops_of_a_step(settings: Config, masked_by: str) -> tuple[int, list[int], dict[str, int]]:
    """(kernels, waits of its two halves, kernels by name) of a step's update, from the exchange to the result."""
    from smoltrain.engine import muon
    from smoltrain.kernels import newton_schulz
    from smoltrain.training import step as step_module
    from tests.device_ops import DeviceOps, count_device_ops

    def orthogonalize_as_on_a_gpu(matrices: Any, steps: int) -> Any:
        return newton_schulz._orthogonalize_stacks(matrices, steps, torch.bfloat16)

    counted: list[DeviceOps] = []

    def count(function: Any) -> Any:
        def counting(*given: Any) -> Any:
            with count_device_ops() as counts:
                result = function(*given)
            counted.append(counts)
            return result

        return counting

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, "orthogonalize", orthogonalize_as_on_a_gpu)
        engine = masked_engine(settings, masked_by, patch)
        for name in ("start_update", "_finish_update"):
            patch.setattr(step_module, name, count(getattr(step_module, name)))
        train_steps(range(1, 4), bare_session(settings, engine, loader_of(settings, 0, 1), reads_late=True))
    begun, finished = counted[-2:]
    kernels = begun.kernels + finished.kernels
    return sum(kernels.values()), [begun.reads, finished.reads], dict(kernels)


@pytest.mark.parametrize(("masked_by", "kind"), MOST_KERNELS)
def test_an_update_is_few_kernels_and_one_read(tmp_path: Path, ranks: Any, masked_by: str, kind: str) -> None:
    """However many tensors there are: of twelve blocks they are 110, and one kernel for each would show."""
    words = ("model.num_hidden_layers=12", f"optimizer.kind={kind}", "track.gradients_every=0")
    settings = prepared(tmp_path, "engine.reduce_gradients=step", *words)
    [(num_kernels, reads, kernels)] = ranks(1).run(ops_of_a_step, settings, masked_by)
    assert num_kernels <= MOST_KERNELS[masked_by, kind], kernels
    assert reads == [0, 1], "nothing is waited for in a step; what became of it is read once, later"
