"""What a profile says to its reader: a table of parts, the operators that take most, and advice with its number."""

from collections.abc import Iterator
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from smoltrain.config.schema import Config
from smoltrain.estimate.training_setup import Recompute
from smoltrain.profiling.kernel_times import sum_by_kernel
from smoltrain.profiling.trace import HOST_GAPS, RECOMPUTED, StepParts
from smoltrain.run.run_warnings import SLOW_DATA_SHARE
from smoltrain.training.step_recorder import OTHER_RANKS

# In the order of a step, with what the reader is told.
PART_LABELS = {
    "data": "data: waiting for rows",
    OTHER_RANKS: "waiting until every rank has rows",
    "embedding": "forward: embedding",
    "attention": "forward: attention",
    "MLP": "forward: MLP",
    "norms": "forward: norms",
    "forward": "forward: all else",
    "loss": "loss, with the head",
    "backward": "backward",
    RECOMPUTED: "backward: recomputed forward",
    "reduction": "reduction: ranks sum gradients",
    "gradients": "gradients looked at",
    "update": "update",
    "records": "records: logs, console",
    HOST_GAPS: "host gaps: Python",
}
COMPILED_FORWARD = "forward: compiled blocks and all else"
NUM_OPERATORS = 8
# From where on a part is worth a word: shares of a step.
LARGE_REDUCTION = 0.10
LARGE_GAPS = 0.15
LARGE_UPDATE = 0.25
LARGE_RECOMPUTATION = 0.10
SMALL_OPERATOR_S = 20e-6  # about what it costs to start one from Python


@dataclass(frozen=True)
class Profile:
    """What was measured of a recipe's steps."""

    parts: StepParts
    num_steps: int  # that were recorded
    plain_step_s: float  # of a step before them, without the profiler
    peak_gib: float  # memory of the largest rank
    ranks: int
    config: Config  # as it was profiled, without any `auto`
    is_compiled: bool
    reduces_once: bool  # gradients are reduced once a step
    least_recompute: Recompute  # the least gradient checkpointing that is estimated to fit here

    def share(self, part: str) -> float:
        """Of the recorded time."""
        return self.parts.seconds.get(part, 0.0) / self.parts.wall_s


def build_step_table(profile: Profile) -> Table:
    """A step by part; the last line is what they add up to."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("where a step goes")
    table.add_column("ms", justify="right")
    table.add_column("share", justify="right")
    names = [*PART_LABELS, *(part for part in profile.parts.seconds if part not in PART_LABELS)]
    for part in names:
        seconds = profile.parts.seconds.get(part, 0.0)
        if seconds > 0:
            label = PART_LABELS.get(part, part)
            if part == "forward" and profile.is_compiled:
                label = COMPILED_FORWARD
            table.add_row(label, f"{1000 * seconds / profile.num_steps:.2f}", f"{profile.share(part):.1%}")
    table.add_row("in all", f"{1000 * profile.parts.wall_s / profile.num_steps:.2f}", "")
    return table


def build_operator_table(profile: Profile) -> Table:
    """Kernels of a GPU, or operators of a CPU, that take most of a step."""
    what = "kernels of a step" if profile.parts.uses_gpu else "operators of a step, as Python calls them"
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(what, overflow="ellipsis", no_wrap=True, max_width=48)
    for head in ("calls", "ms", "share"):
        table.add_column(head, justify="right", no_wrap=True, min_width=len("100.0%"))
    for name, count, seconds in sum_by_kernel(profile.parts.operators)[:NUM_OPERATORS]:
        shown = name.removeprefix("autograd::engine::evaluate_function: ")
        times = f"{count / profile.num_steps:,.3g}"
        took = f"{1000 * seconds / profile.num_steps:.2f}"
        table.add_row(shown, times, took, f"{seconds / profile.parts.wall_s:.1%}")
    return table


def describe_measurement(profile: Profile) -> str:
    """What was measured, and what measuring cost."""
    recorded_s = profile.parts.wall_s / profile.num_steps
    slower = recorded_s / profile.plain_step_s - 1
    return (
        f"{profile.num_steps} steps of rank 0 of {profile.ranks}: {1000 * recorded_s:.1f} ms each under the profiler, "
        f"{1000 * profile.plain_step_s:.1f} ms without it ({slower:+.0%}); memory at its peak {profile.peak_gib:.2f} "
        "GiB a rank"
    )


def write_profile_advice(profile: Profile) -> Iterator[str]:
    """A line for each part that is large and can be made smaller, with the key; nothing without a number."""
    engine = profile.config.engine
    share = profile.share("data")
    if share > SLOW_DATA_SHARE:
        ahead = "" if profile.config.data.mode == "cached" else "data.mode=cached tokenises them ahead; or "
        yield f"{share:.0%} of a step waits for rows: {ahead}give each rank more CPU cores or a faster disk"
    share = profile.share(OTHER_RANKS)
    if share > SLOW_DATA_SHARE:
        yield f"{share:.0%} of a step waits until every rank has rows: another rank is slower than rank 0"
    share = profile.share("reduction")
    if share > LARGE_REDUCTION:
        if profile.reduces_once:
            keys = "a larger batch.accumulation makes it rarer, with more rows in a step"
        else:
            keys = "engine.reduce_gradients=step does it once a step instead of after each micro-batch"
        yield f"{share:.0%} of a step reduces gradients, waiting for other ranks included: {keys}"
    share = profile.share(RECOMPUTED)
    if share > LARGE_RECOMPUTATION and profile.least_recompute != engine.gradient_checkpointing:
        yield (
            f"{share:.0%} of a step computes activations again: engine.gradient_checkpointing="
            f"{profile.least_recompute} is estimated to fit here too"
        )
    yield from _advise_on_gaps(profile)
    share = profile.share("update")
    if share > LARGE_UPDATE:
        yield (
            f"{share:.0%} of a step is the update, which costs the same for any number of rows: more of them in a "
            "step (batch.accumulation, or batch.rows_per_step) make it rarer"
        )


def _advise_on_gaps(profile: Profile) -> Iterator[str]:
    """Of a device that waits for Python, and of operators that are too small to be worth starting."""
    share = profile.share(HOST_GAPS)
    operators = profile.parts.operators
    small = [run.took_s for run in operators if run.took_s < SMALL_OPERATOR_S]
    share_of_small = sum(small) / profile.parts.wall_s
    if share > LARGE_GAPS:
        who = "the GPU waits for Python" if profile.parts.uses_gpu else "Python runs between two operators"
        yield f"{share:.0%} of a step {who}: {_fewer_operators(profile)}"
    elif share + share_of_small > LARGE_GAPS and not profile.is_compiled:
        yield (
            f"{len(small) / profile.num_steps:,.0f} operators of a step take less than {1e6 * SMALL_OPERATOR_S:.0f} us "
            f"each, {share_of_small:.0%} of its time together: {_fewer_operators(profile)}"
        )


def _fewer_operators(profile: Profile) -> str:
    rows = profile.config.batch.micro_batch_rows
    more_rows = f"a batch.micro_batch above {rows}, with as much less accumulation, gives each more to do"
    if profile.is_compiled:
        return more_rows
    return f"engine.compile=on makes fewer and larger ones; {more_rows}"
