"""Spikes: a loss that is not finite, or far above those of the steps before, is met before it moves a weight.

RUN/spikes.jsonl is the journal: a line for each spike, with what was done and every row of the guilty step. Its lines
that say "rewind" are the truth about which rows the run passes over, at every later start and on any number of ranks.
B: rows per step.
"""

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from smoltrain import files
from smoltrain.config.schema import SpikesSection
from smoltrain.data.rows.row_contents import RowContents
from smoltrain.distributed.world import World
from smoltrain.errors import Problem, TrainingStopped, UserError
from smoltrain.run.run_folder import SPIKES_FILE

MIN_HISTORY = 16  # losses, below which there is nothing to compare with
SIGMA_PER_MAD = 1.4826  # of a normal distribution, in median absolute deviations
MIN_MAD = 0.01  # nats per token: the least median absolute deviation, lest a flat loss calls any change a spike
MAX_NAMED_ROWS = 3  # rows on the console


class Rewind(Exception):
    """Go back to the newest valid checkpoint and on from there, with the rows of the journal passed over."""


@dataclass(frozen=True)
class Spike:
    """A step that must not be applied, with all of its rows, by position."""

    step: int
    loss: float  # nats per token, of the whole step
    reason: str  # why it is one
    circumstances: str  # what else is known of it: ranks, lr, gradient norm
    in_a_row: int  # spikes of this step so far, this one too
    rows: list[RowContents]
    row_losses: list[float]  # nats per token of each row alone, without dropout

    @property
    def first_position(self) -> int:
        """Position of its first row."""
        return self.rows[0].position

    def rows_worst_first(self) -> list[tuple[RowContents, float]]:
        """The rows from the worst one on: not finite before finite, then by loss."""

        def badness(pair: tuple[RowContents, float]) -> float:
            return pair[1] if math.isfinite(pair[1]) else math.inf

        return sorted(zip(self.rows, self.row_losses, strict=True), key=badness, reverse=True)

    def rows_to_name(self) -> list[tuple[RowContents, float]]:
        """Those to name: the ones that are not finite; if there are none, the worst few."""
        worst_first = self.rows_worst_first()
        not_finite = [pair for pair in worst_first if not math.isfinite(pair[1])]
        return not_finite or worst_first[:MAX_NAMED_ROWS]

    def headline(self) -> str:
        """The loss, why it is a spike, and what the rows alone say."""
        facts = [self.reason, self.row_verdict(), "nothing was updated"]
        in_words = "; ".join(fact for fact in facts if fact)
        return f"the loss of step {self.step} is {self.loss:.6g} {self.circumstances}; {in_words}"

    def row_verdict(self) -> str | None:
        """What the rows say about the step when each is looked at alone; None if nothing clear."""
        num_bad = sum(not math.isfinite(loss) for loss in self.row_losses)
        if num_bad and num_bad == len(self.rows):
            return "every row is bad by itself, so it is the weights or the lr rather than the data"
        if not num_bad and not math.isfinite(self.loss):
            return "no row is bad by itself"
        return None


class Decision(NamedTuple):
    """What becomes of a spike."""

    does: str  # skip, rewind or stop
    rows: tuple[int, int]  # positions from the first one up to, but without, the last
    attempt: int  # how many times this was done, this one too


class SpikeGuard:
    """Tells spikes from losses, the same on every rank, and says what becomes of them."""

    def __init__(
        self,
        section: SpikesSection,
        world: World,
        journal: Path | None = None,
        entries: Iterable[dict[str, Any]] = (),
        history: Iterable[tuple[float, int]] = (),
    ) -> None:
        """`history` is (loss, rows consumed after it) of the applied steps before; without a journal none is kept."""
        self._section = section
        self._world = world
        self._journal = journal
        rewinds = [entry for entry in entries if entry["does"] == "rewind"]
        self._skipped = [(entry["rows"][0], entry["rows"][1]) for entry in rewinds]  # positions first..last - 1
        self._history = deque(history, maxlen=max(section.history, section.window))

    @classmethod
    def open(cls, folder: Path, section: SpikesSection, world: World, *, step: int) -> "SpikeGuard":
        """The guard of a run that goes on after `step`, as it was then: the journal, and the losses of metrics.jsonl.

        To be called at each start, and again after a rewind. Collective.
        """

        def read() -> tuple[list[dict[str, Any]], list[tuple[float, int]]]:
            losses = deque(_read_losses(folder / files.METRICS_FILE, step), maxlen=max(section.history, section.window))
            return read_spikes(folder), list(losses)

        entries, history = world.run_on_first_rank(read)
        return cls(section, world, folder / SPIKES_FILE, entries, history)

    def is_row_skipped(self, position: int) -> bool:
        """Whether the row at this position is one of those that a rewind left out."""
        return any(first <= position < last for first, last in self._skipped)

    def largest_sound_loss(self) -> float:
        """Nats per token; what is above it is a spike. inf where there is nothing to compare with."""
        losses = self._compared_losses()
        if not losses:
            return math.inf
        middle, deviation = _middle_and_deviation(losses)
        return middle + self._section.deviations * deviation

    def find_spike_reason(self, loss: float) -> str | None:
        """Why this loss, nats per token over all ranks, is a spike; None if it is none."""
        if not math.isfinite(loss):
            return "it is not finite"
        if loss <= self.largest_sound_loss():
            return None
        losses = self._compared_losses()
        middle, deviation = _middle_and_deviation(losses)
        far = (loss - middle) / deviation
        return f"it is {far:.1f} robust deviations above {middle:.4g}, the median of the last {len(losses)} steps"

    def _compared_losses(self) -> list[float]:
        """Those that a loss is compared with; [] where that is not asked for, or too few are known."""
        losses = [known for known, _ in self._history][-self._section.history :]
        return losses if self._section.deviations and len(losses) >= MIN_HISTORY else []

    def record_loss(self, loss: float, rows_consumed: int) -> None:
        """A step of this loss was applied, after which so many rows are consumed."""
        self._history.append((loss, rows_consumed))

    def handle_spike(self, spike: Spike, say: Callable[[str], None], mix_begins: int = 0) -> None:
        """Log a spike, write it into the journal, then skip, rewind or stop. Returns for a skip. Collective.

        A rewind's window does not reach back before the row `mix_begins`: other rows would stand at those positions.
        Errors: Rewind; TrainingStopped if the run is to end.
        """
        decision = self._decide(spike, mix_begins)
        first, last = decision.rows
        self._append_to_journal(spike, does=decision.does, rows=decision.rows, attempt=decision.attempt)
        headline = spike.headline()
        if decision.does == "stop":
            raise TrainingStopped(self._stop_message(spike, headline))
        say(headline)
        for row, loss in spike.rows_to_name()[:MAX_NAMED_ROWS]:
            say(f"  {row} has a loss of {loss:.6g}")
        attempt = f"{decision.attempt} of at most {self._section.max_times}"
        if decision.does == "skip":
            say(f"  the rows of the step are spent without an update ({attempt} in a row)")
            return
        self._skipped.append(decision.rows)
        what = f"rewind {attempt}: back to the newest checkpoint, and on from there"
        raise Rewind(f"{what} without the rows {first:,} to {last - 1:,}")

    def _decide(self, spike: Spike, mix_begins: int) -> "Decision":
        """What becomes of a spike, as the recipe says."""
        section = self._section
        end = spike.first_position + len(spike.rows)
        if section.on_spike == "rewind":
            first = max(self._window_start(spike), min(mix_begins, spike.first_position))
            does = "stop" if len(self._skipped) >= section.max_times else "rewind"
            return Decision(does, (first, end), attempt=len(self._skipped) + 1)
        does = "stop" if spike.in_a_row > section.max_times else section.on_spike
        return Decision(does, (spike.first_position, end), attempt=spike.in_a_row)

    def _window_start(self, spike: Spike) -> int:
        """The position of the first row of the last `window` steps, the spike's the last one; 0 if there are fewer."""
        before = self._section.window - 1
        if not before:
            return spike.first_position
        return self._history[-before][1] - len(spike.rows) if before <= len(self._history) else 0

    def _stop_message(self, spike: Spike, headline: str) -> str:
        """Why the run ends, and what its user could do."""
        section = self._section
        rows = [f"{row} has a loss of {loss:.6g}" for row, loss in spike.rows_to_name()[:MAX_NAMED_ROWS]]
        advice = "try a lower lr, a longer warm-up, gradient_clipping 1.0, or look at the data of this step"
        if self._journal:
            advice += f", all of whose rows are in {self._journal}"
        more = {
            "stop": "spikes.on_spike=skip or rewind would go on without these rows",
            "skip": f"more than spikes.max_times = {section.max_times} skips in a row",
            "rewind": f"more than spikes.max_times = {section.max_times} rewinds",
        }[section.on_spike]
        return "; ".join([headline, *rows, "the last checkpoint is intact", advice, more])

    def record_end(self, step: int, loss: float, reason: str, rows: tuple[int, int]) -> None:
        """Write down that the run ends in this step although its loss is no spike. Collective. Errors: TrainingStopped.

        `rows` are the positions of the step's rows, from the first up to, but without, the last.
        """
        self._write_line({"step": step, "time_s": round(time.time(), 3), "loss": loss, "why": reason, "does": "stop",
                          "rows": rows})  # fmt: skip

    def _append_to_journal(self, spike: Spike, **facts: Any) -> None:
        """One line of the journal, on the disk when this returns. Collective. Errors: TrainingStopped."""
        line = {
            "step": spike.step,
            "time_s": round(time.time(), 3),
            "loss": spike.loss,
            "why": spike.reason,
            **facts,
            "about": spike.circumstances,
            "verdict": spike.row_verdict() or "",
            "worst_first": [{"loss": loss, **asdict(row)} for row, loss in spike.rows_worst_first()],
        }
        self._write_line(line)

    def _write_line(self, line: dict[str, Any]) -> None:
        if not (journal := self._journal):
            return

        def append() -> None:
            try:
                with journal.open("a", encoding="utf-8") as file:
                    file.write(files.format_json_line(line))
                    file.flush()
                    os.fsync(file.fileno())
                files.fsync_path(journal.parent)
            except OSError as error:
                raise TrainingStopped(f"{journal} cannot be written: {error}; the last checkpoint is intact") from None

        self._world.run_on_first_rank(append)


def _middle_and_deviation(losses: list[float]) -> tuple[float, float]:
    """The median, and the robust deviation: one outlier among the losses changes neither."""
    middle = median(losses)
    return middle, SIGMA_PER_MAD * max(MIN_MAD, median(abs(known - middle) for known in losses))


def read_spikes(folder: Path) -> list[dict[str, Any]]:
    """The lines of RUN/spikes.jsonl; a last one that a crash cut short never was, and is removed.

    Errors: UserError for a damaged one, as nobody could say which rows the run passes over.
    """
    path = folder / SPIKES_FILE
    lines = list(files.read_jsonl_lines(path, ("step", "does", "rows")))
    damaged = [line for line in lines if line.fault]
    if damaged:
        raise UserError(
            Problem(
                what="the journal of spikes is damaged",
                saw=files.describe_damaged_lines(path, damaged),
                want="the line as it was written; without it the run would train on rows that it had passed over",
                change="the line, or delete it to accept that",
            )
        )
    size = sum(len(line.raw) for line in lines)
    if path.exists() and path.stat().st_size > size:
        files.keep_jsonl_lines(path, lines)
    return [line.value for line in lines]


def _read_losses(path: Path, last_step: int) -> Iterable[tuple[float, int]]:
    """(loss, rows consumed after it) of each training step up to `last_step` in metrics.jsonl."""
    for line in files.read_jsonl(path, say=lambda _: None):  # the tracker says what is damaged
        if line["step"] <= last_step and "data/rows" in line:
            yield line["train/loss_nats_per_token"], int(line["data/rows"])
