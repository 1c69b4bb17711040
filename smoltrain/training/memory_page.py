"""The page in which running out of memory ends: who, what was there beside what was estimated, what would fit.

Its beginning goes to the console, all of it to logs/out-of-memory-rankN.txt.
"""

import datetime
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from smoltrain.distributed.memory_limits import MemoryLimit
from smoltrain.engine.held_tensors import HeldTensors
from smoltrain.errors import Problem
from smoltrain.estimate.constants import GIB, SPARE_SHARE
from smoltrain.estimate.memory import PART_LABELS
from smoltrain.estimate.report import Estimate, make_table
from smoltrain.estimate.smaller_settings import SmallerSetting

NUM_TENSORS = 12  # kinds of tensors that the page lists
PAGE_WIDTH = 110
SEEN_PARTS = ("weights", "optimizer", "gradients")  # whose tensors are known one by one; the others are a remainder


@dataclass(frozen=True)
class MemoryFailure:
    """What is known of a rank that ran out of memory. Bytes throughout."""

    rank: int
    num_ranks: int
    host: str
    where: str  # in the run, as in `in step 3, forward`
    what: str  # has failed, in the words of who said so
    limit: MemoryLimit
    asked: float = 0.0  # what was asked for and not to be had; 0 if nobody knows
    held: float | None = None  # what the rank had in all, if somebody has measured it
    held_parts: Mapping[str, float] = field(default_factory=dict)
    tensors: Sequence[HeldTensors] = ()
    notes: Sequence[str] = ()
    estimate: Estimate | None = None  # None for a model that cannot be estimated
    settings: Sequence[SmallerSetting] = ()
    speeds: str = ""  # by whose speed the costs of the settings are estimated
    advice: str = ""  # what to change where no setting is known to fit

    @property
    def needed(self) -> float:
        """At least so many bytes would have had to be there; 0 if nobody knows."""
        return (self.held or 0.0) + self.asked


def describe_failure(failure: MemoryFailure, page: Path) -> Problem:
    """The one line."""
    saw = "memory used up" if failure.held is None else f"{format_gib(failure.held)} held"
    if failure.asked:
        saw += f" and {format_gib(failure.asked)} more asked for"
    change = ", or ".join(map(str, failure.settings)) or failure.advice
    return Problem(
        f"rank {failure.rank} on {failure.host} ran out of memory {failure.where}", saw,
        f"at most {format_gib(failure.limit.num_bytes)} ({failure.limit.source})", f"{change}; the page is {page}",
    )  # fmt: skip


def format_gib(num_bytes: float) -> str:
    """As in `1.50 GiB`; small sizes in MiB."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.1f} MiB"


def format_tables(failure: MemoryFailure) -> str:
    """For the console: memory by part, and what would fit."""
    return "\n".join(_render(table) for table in (_build_parts_table(failure), *_build_settings_tables(failure)))


def format_page(failure: MemoryFailure, now: datetime.datetime | None = None) -> str:
    """All that is known."""
    now = now or datetime.datetime.now().astimezone()
    lines = [
        f"Out of memory: rank {failure.rank} of {failure.num_ranks} on {failure.host}, {failure.where}",
        f"at {now:%Y-%m-%d %H:%M:%S %z}",
        f"what failed: {failure.what}",
        f"the limit: {format_gib(failure.limit.num_bytes)}, {failure.limit.source}",
        *failure.notes,
        "",
        _render(_build_parts_table(failure)),
        *_explain_parts(failure),
        "",
        *(_render(table) for table in _build_settings_tables(failure)),
        *_explain_settings(failure),
    ]
    if failure.tensors:
        lines += ["", _render(_build_tensors_table(failure.tensors)), *_explain_tensors(failure)]
    return "\n".join(lines) + "\n"


def write_page(failure: MemoryFailure, logs: Path) -> Path:
    """Its path, in the folder of logs. Errors: OSError."""
    path = logs / f"out-of-memory-rank{failure.rank}.txt"
    logs.mkdir(parents=True, exist_ok=True)
    path.write_text(format_page(failure), encoding="utf-8")
    return path


def _build_parts_table(failure: MemoryFailure) -> Table:
    table = make_table({f"memory of rank {failure.rank}": "left", "estimated GiB": "right", "really GiB": "right"})
    estimated = failure.estimate.memory if failure.estimate else None
    for part in SEEN_PARTS:
        expected = None if estimated is None else estimated[part]
        table.add_row(PART_LABELS[part], _format_cell(expected), _format_cell(failure.held_parts.get(part)))
    seen = sum(failure.held_parts.values())
    remainder = None if failure.held is None or not failure.held_parts else max(0.0, failure.held - seen)
    expected = None if estimated is None else estimated.total - sum(estimated[part] for part in SEEN_PARTS)
    table.add_row("activations, logits, buffers, the rest", _format_cell(expected), _format_cell(remainder))
    table.add_row("in all", _format_cell(None if estimated is None else estimated.total), _format_cell(failure.held))
    if failure.asked:
        table.add_row("asked for on top", "", _format_cell(failure.asked))
    return table


def _format_cell(num_bytes: float | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / GIB:.3f}"


def _explain_parts(failure: MemoryFailure) -> Iterator[str]:
    yield "Estimated: at the fullest moment of a step. Really: when it failed."
    if failure.estimate is None:
        yield "No estimate: of a model of a program's own nothing is known."
        return
    setup = failure.estimate.setup
    yield (
        f"The estimate is of {setup.shape.parameters:,} parameters in {setup.precision}, ZeRO-{setup.stage} on "
        f"{setup.world} ranks, {setup.micro_batch} x {setup.accumulation} rows a rank, T {setup.length}, gradient "
        f"checkpointing {setup.recompute}, attention {setup.attention}, loss {setup.loss}."
    )
    beyond = failure.needed - failure.estimate.memory.total
    if beyond > 0:
        yield f"At least {format_gib(beyond)} more was needed than estimated; the settings below have that on top."


def _build_settings_tables(failure: MemoryFailure) -> Iterator[Table]:
    if not failure.settings:
        return
    table = make_table({"what would fit": "left", "estimated GiB": "right", "a step": "right"})
    table.columns[0].overflow = "fold"
    for setting in failure.settings:
        table.add_row(" ".join(setting.overrides), _format_cell(setting.memory_bytes), setting.cost)
    yield table


def _explain_settings(failure: MemoryFailure) -> Iterator[str]:
    if failure.settings:
        yield (
            f"Each is estimated to leave {SPARE_SHARE:.0%} of the limit free, and trains on the same rows in the same "
            f"steps; time is estimated by the speed of {failure.speeds}."
        )
    else:
        yield f"What to change: {failure.advice}."


def _build_tensors_table(tensors: Sequence[HeldTensors]) -> Table:
    table = make_table(
        {"largest tensors": "left", "shape": "right", "dtype": "right", "number": "right", "GiB": "right"}
    )
    for one in tensors[:NUM_TENSORS]:
        shape = " x ".join(map(str, one.shape)) or "scalar"
        table.add_row(
            PART_LABELS.get(one.part, one.part), shape, one.dtype, f"{one.count:,}", f"{one.num_bytes / GIB:.3f}"
        )
    return table


def _explain_tensors(failure: MemoryFailure) -> Iterator[str]:
    left = failure.tensors[NUM_TENSORS:]
    if left:
        yield f"{len(left)} more kinds of tensors have {format_gib(sum(one.num_bytes for one in left))} together."
    yield "Of what autograd keeps for the backward pass only those are among them that a Python object names."


def _render(table: Table) -> str:
    """As text, without the spaces at the ends of lines."""
    file = io.StringIO()
    Console(file=file, width=PAGE_WIDTH, color_system=None, force_terminal=False).print(table)
    return "\n".join(line.rstrip() for line in file.getvalue().rstrip("\n").splitlines())
