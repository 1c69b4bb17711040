"""Spikes: met before the update, the rows named, and then a stop, a skip or a rewind that leaves no trace of them."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from smoltrain.config.schema import Config, SpikesSection
from smoltrain.data.rows.row_contents import Passage, RowContents
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.errors import TrainingStopped
from smoltrain.run.run_folder import SPIKES_FILE
from smoltrain.training.spikes import Rewind, Spike, SpikeGuard, read_spikes
from tests import tiny
from tests.engines import fresh_model, loader_of, masked_engine
from tests.ranks import world
from tests.sessions import bare_session

B = 8  # rows of a step on two ranks
FLAT = [(3.0, B * n) for n in range(1, 41)]  # losses, rows consumed after them


class Alone:
    """A world of one, for what no other rank needs to know."""

    def run_on_first_rank(self, work: Callable[[], Any]) -> Any:
        return work()


def guard_of(journal: Path | None = None, history: Any = (), **section: Any) -> SpikeGuard:
    alone: Any = Alone()
    return SpikeGuard(SpikesSection(**section), alone, journal, (), history)


def spike_of(step: int, loss: float = math.nan, in_a_row: int = 1, row_losses: tuple[float, ...] = ()) -> Spike:
    """A step of B rows, of which the fifth is not finite."""
    rows = [RowContents((step - 1) * B + i, "data", (Passage(0, 16, f"{i:02}.txt", i, "to be"),)) for i in range(B)]
    losses = list(row_losses) or [math.nan if i == 4 else 3.0 + i / 10 for i in range(B)]
    return Spike(step, loss, "it is not finite", "(lr 0.1, gradient norm 7)", in_a_row, rows, losses)


# ---- what is a spike


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_always_a_spike(loss: float) -> None:
    assert guard_of().find_spike_reason(loss) == "it is not finite"


def test_a_loss_far_above_the_median_is_a_spike_and_one_below_it_never_is() -> None:
    noisy = [(3.0 + 0.1 * (n % 5 - 2), n) for n in range(40)]  # median 3.0, median absolute deviation 0.1
    guard = guard_of(history=noisy, deviations=6)
    assert guard.find_spike_reason(3.0 + 5.9 * 0.14826) is None
    reason = guard.find_spike_reason(3.0 + 6.1 * 0.14826)
    assert reason
    assert reason.startswith("it is 6.1 robust deviations above 3, the median of the last 40")
    assert guard.find_spike_reason(0.01) is None
    assert guard_of(history=noisy).find_spike_reason(1e9) is None, "no deviations are asked for"


def test_too_few_losses_are_no_measure() -> None:
    assert guard_of(history=FLAT[:15], deviations=3).find_spike_reason(1e9) is None
    assert guard_of(history=FLAT[:16], deviations=3).find_spike_reason(1e9)


def test_a_flat_loss_is_no_trap() -> None:
    guard = guard_of(history=FLAT, deviations=6)
    assert guard.find_spike_reason(3.0 + 6 * 1.4826 * 0.0099) is None
    assert guard.find_spike_reason(3.0 + 6 * 1.4826 * 0.0101)


def test_only_the_last_losses_count() -> None:
    guard = guard_of(history=[(9.0, n) for n in range(100)], deviations=6)
    for n in range(128):
        guard.record_loss(3.0, n)
    assert guard.find_spike_reason(9.0)


# ---- what becomes of it


def test_stop_names_the_rows_and_documents() -> None:
    with pytest.raises(TrainingStopped) as stopped:
        guard_of().handle_spike(spike_of(3), print)
    message = str(stopped.value)
    assert message.startswith(
        "the loss of step 3 is nan (lr 0.1, gradient norm 7); it is not finite; nothing was updated"
    )
    assert "row 20 of 'data' (04.txt 'to be') has a loss of nan" in message
    assert "03.txt" not in message
    assert "spikes.on_spike=skip or rewind would go on" in message


def test_weights_that_are_bad_are_not_blamed_on_the_data() -> None:
    with pytest.raises(TrainingStopped, match="every row is bad by itself, so it is the weights or the lr"):
        guard_of().handle_spike(spike_of(3, row_losses=(math.nan,) * B), print)


def test_skips_are_counted_in_a_row_and_end(tmp_path: Path) -> None:
    guard, said = guard_of(tmp_path / SPIKES_FILE, on_spike="skip", max_times=2), []
    for in_a_row in (1, 2):
        guard.handle_spike(spike_of(3, in_a_row=in_a_row), said.append)
        assert f"({in_a_row} of at most 2 in a row)" in said[-1]
    with pytest.raises(TrainingStopped, match=r"more than spikes.max_times = 2 skips in a row"):
        guard.handle_spike(spike_of(3, in_a_row=3), said.append)
    assert [line["does"] for line in read_spikes(tmp_path)] == ["skip", "skip", "stop"]
    assert not guard.is_row_skipped(16), "a skip is for now; only what a rewind left out is passed over"


def test_the_journal_says_what_a_rewind_left_out_at_every_later_start(tmp_path: Path) -> None:
    section, alone, said = {"on_spike": "rewind", "max_times": 2}, Alone(), []
    for attempt, step in ((1, 3), (2, 5)):
        guard = SpikeGuard.open(tmp_path, SpikesSection(**section), alone, step=0)  # pyright: ignore[reportArgumentType]
        with pytest.raises(Rewind, match=f"rewind {attempt} of at most 2"):
            guard.handle_spike(spike_of(step), said.append)
        with (tmp_path / SPIKES_FILE).open("a") as file:
            file.write('{"step": 9, "does": "rew')  # a crash in the middle of a line
    first, second = read_spikes(tmp_path)
    assert (first["rows"], second["rows"], second["attempt"]) == ([16, 24], [32, 40], 2)
    assert first["worst_first"][0]["position"] == 20
    assert first["worst_first"][0]["passages"][0]["address"] == "04.txt"
    guard = SpikeGuard.open(tmp_path, SpikesSection(**section), alone, step=0)  # pyright: ignore[reportArgumentType]
    assert [p for p in range(48) if guard.is_row_skipped(p)] == [*range(16, 24), *range(32, 40)]
    with pytest.raises(TrainingStopped, match=r"more than spikes.max_times = 2 rewinds"):
        guard.handle_spike(spike_of(7), said.append)


@pytest.mark.parametrize(
    ("window", "mix_begins", "first"), [(1, 0, 48), (2, 0, 40), (4, 0, 24), (4, 40, 40), (99, 0, 0)]
)
def test_a_window_reaches_back_over_whole_steps_of_one_mix(window: int, mix_begins: int, first: int) -> None:
    """Step 2 had two tries: its rows are 8 to 23, those that it was applied with 16 to 23."""
    history = [(3.0, 8), (3.0, 24), (3.0, 32), (3.0, 40), (3.0, 48)]
    guard = guard_of(history=history, on_spike="rewind", window=window)
    with pytest.raises(Rewind, match=f"without the rows {first} to 55$"):
        guard.handle_spike(spike_of(7), print, mix_begins)


def test_the_history_is_what_it_was_at_the_restored_step(tmp_path: Path) -> None:
    lines = [{"step": n, "train/loss_nats_per_token": 3.0 + n / 7, "data/rows": 8 * n} for n in range(1, 61)]
    lines.insert(30, {"step": 30, "validation/loss_nats_per_token": 99.0})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 61, "train/lo')
    alone: Any = Alone()
    resumed = SpikeGuard.open(tmp_path, SpikesSection(history=16, deviations=3), alone, step=40)
    never_stopped = guard_of(deviations=3)
    for n in range(1, 41):
        never_stopped.record_loss(3.0 + n / 7, 8 * n)
    assert list(resumed._history) == list(never_stopped._history)[-16:]


def test_a_journal_that_cannot_be_written_ends_the_run_with_one_line(tmp_path: Path) -> None:
    (tmp_path / SPIKES_FILE).mkdir()
    with pytest.raises(TrainingStopped, match=r"spikes.jsonl cannot be written.*the last checkpoint is intact"):
        guard_of(tmp_path / SPIKES_FILE, on_spike="rewind").handle_spike(spike_of(3), print)


# ---- on ranks, with a model


def prepared(tmp_path: Path, *overrides: str) -> Config:
    settings = tiny.load(tmp_path, *overrides)
    prepare_run_data(settings)
    return settings


def spoilt(wrapped: Any, loader: Any, step: int, by: Callable[[torch.Tensor], torch.Tensor]) -> int:
    """Change the loss of the second row that rank 1 has in a step's first try; returns the row's position."""
    forward, begins = wrapped.forward, (step - 1) * B
    guilty: list[torch.Tensor] = []

    def poisoned(batch: Any) -> torch.Tensor:
        loss = forward(batch)
        is_first_try = loader.rows_consumed == begins
        if world().rank == 1 and is_first_try and not guilty:
            guilty.append(loader.fetch_step_rows().micro_batches[0].ids_BT[1])
        is_looked_at = bool(guilty) and not torch.is_grad_enabled()  # each row alone, after the step
        if (is_first_try or is_looked_at) and guilty and (batch.ids_BT == guilty[0]).all(1).any():
            return by(loss)
        return loss

    wrapped.forward = poisoned
    return begins


def steps_with(
    settings: Config, precision: str, spikes: dict[str, Any], how: str, late: bool = False
) -> dict[str, Any]:
    """Five steps. how: a bad row in the third, 'nan' or 'high'; or 'passed', its rows left out from the beginning.

    `late`: as on a GPU, where the host reads of an update when the next step is under way.
    """
    from smoltrain.engine.build_engine import build_engine
    from smoltrain.training import step

    here = world()
    if late:
        with pytest.MonkeyPatch.context() as patch:
            wrapped = masked_engine(settings, "own step", patch)
    else:
        wrapped = build_engine(fresh_model(settings), settings, here, precision=precision, accumulation=2)
    loader = loader_of(settings, here.rank, here.size)
    entries = [{"does": "rewind", "rows": [2 * B, 3 * B]}] if how == "passed" else []
    history = [(5.8, 0)] * 16 if how == "high" else []
    guard = SpikeGuard(SpikesSection(**spikes), here, settings.run_folder / SPIKES_FILE, entries, history)
    if how == "nan":
        spoilt(wrapped, loader, 3, lambda loss: loss * math.nan)
    elif how == "high":
        spoilt(wrapped, loader, 3, lambda loss: loss + 16 * 100.0)
    before = wrapped.weights(keep=True)
    session = bare_session(settings, wrapped, loader, guard=guard, reads_late=late)
    seen: dict[str, Any] = {
        "said": session.tracker.said, "marks": session.watchdog.places, "digests": [], "skipped": 0, "error": None,
        "reduction": wrapped.reduction,
    }  # fmt: skip
    try:
        for _, result in step.train_steps(range(1, 6), session, lambda _: False):
            before = wrapped.weights(keep=True)
            seen["digests"] += result.digests.tolist()
            seen["skipped"] += result.num_skipped
    except (TrainingStopped, Rewind) as error:
        seen["error"] = f"{type(error).__name__}: {error}"
        seen["unmoved"] = all(torch.equal(w, before[name]) for name, w in wrapped.weights(keep=True).items())
    return seen | {"weights": wrapped.weights(keep=True), "ledger": loader.ledger, "rows": loader.rows_consumed}


@pytest.mark.parametrize(
    ("stage", "precision", "reduce", "how"),
    [
        (2, "fp32", "micro_batch", "high"),
        (2, "fp32", "step", "high"),
        (2, "bf16", "micro_batch", "nan"),
        (2, "bf16", "step", "nan"),
        *(
            pytest.param(*cell, marks=pytest.mark.slow)
            for cell in (
                (0, "fp32", "micro_batch", "nan"),
                (1, "bf16", "micro_batch", "high"),
                (1, "fp32", "micro_batch", "nan"),
                (1, "fp32", "step", "nan"),
                (3, "fp32", "micro_batch", "nan"),
                (3, "bf16", "micro_batch", "high"),
            )
        ),
    ],
)
def test_skipped_rows_leave_no_trace_and_neither_do_rows_that_are_passed_over(
    tmp_path: Path, ranks: Any, stage: int, precision: str, reduce: str, how: str
) -> None:
    words = (f"engine.ds_config=zero{stage}", f"engine.precision={precision}", f"engine.reduce_gradients={reduce}")
    settings = prepared(tmp_path, *words)
    spikes = {"on_spike": "skip", "deviations": 6.0}
    skipped = ranks(2).run(steps_with, settings, precision, spikes, how)
    passed = ranks(2).run(steps_with, settings, precision, spikes, "passed")
    for ours, theirs in zip(skipped, passed, strict=True):
        assert ("DeepSpeed" in ours["reduction"]) == (reduce == "micro_batch"), ours["reduction"]
        assert ours["error"] is theirs["error"] is None
        assert ours["skipped"] == theirs["skipped"] == 1
        assert ours["rows"] == 6 * B
        assert (ours["digests"], ours["ledger"]) == (theirs["digests"], theirs["ledger"])
        assert len(ours["digests"]) == 6 * B
        for name, weight in ours["weights"].items():
            assert torch.equal(weight, theirs["weights"][name]), name
        assert not theirs["said"]
    assert skipped[0]["said"] == skipped[1]["said"]
    assert skipped[0]["marks"] == skipped[1]["marks"], "ranks are compared by their marks"
    (line,) = read_spikes(settings.run_folder)
    assert line["rows"] == [16, 24]
    assert [row["position"] for row in sorted(line["worst_first"], key=lambda r: r["position"])] == [*range(16, 24)]


@pytest.mark.parametrize(
    ("on_spike", "mode", "stage", "late"),
    [
        ("stop", "cached", 3, False),
        ("rewind", "stream", 3, False),
        ("stop", "cached", 2, True),
        ("rewind", "stream", 2, True),
    ],
)
def test_before_anything_moves_the_guilty_document_is_named(
    tmp_path: Path, ranks: Any, on_spike: str, mode: str, stage: int, late: bool
) -> None:
    """Late, the rows of the next step have been taken already."""
    settings = prepared(tmp_path, f"engine.ds_config=zero{stage}", "engine.precision=fp32", f"data.mode={mode}")
    seen = ranks(2).run(steps_with, settings, "fp32", {"on_spike": on_spike}, "nan", late)
    assert seen[0]["error"] == seen[1]["error"]
    assert seen[0]["unmoved"]
    assert seen[1]["unmoved"]
    error = seen[0]["error"]
    (line,) = read_spikes(settings.run_folder)
    worst, *others = line["worst_first"]
    assert math.isnan(worst["loss"])
    assert all(math.isfinite(row["loss"]) for row in others)
    text = error if on_spike == "stop" else "\n".join(seen[0]["said"])
    assert "the loss of step 3 is nan on rank 1 (lr " in text
    assert f"row {worst['position']} of 'data'" in text
    if on_spike == "rewind":
        assert error.startswith("Rewind: rewind 1 of at most 3: back to the newest checkpoint")
        assert error.endswith("without the rows 16 to 23")
    loader = loader_of(settings, 0, 1)  # the row at that position, by another world and by hand
    while loader.rows_consumed + 4 <= worst["position"]:
        rows = loader.fetch_step_rows()
        loader.mark_consumed(loader.unpack_totals(rows.counts))
    loader.fetch_step_rows()
    (row,) = (row for row in loader.hold_rows()() if row.position == worst["position"])
    assert worst["passages"] == [asdict(passage) for passage in row.passages]
    loader.close()
    for passage in worst["passages"]:
        assert passage["address"] in text
        assert passage["text"].strip() in (tmp_path / "corpus" / passage["address"]).read_text()
