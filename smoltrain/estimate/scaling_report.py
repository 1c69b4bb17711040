"""What an estimate of several worlds says to its reader: a table, and sentences."""

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.table import Table

from smoltrain.estimate.constants import CHECKPOINT_COPY, CHECKPOINT_WRITE, GB
from smoltrain.estimate.failures import FailureCosts
from smoltrain.estimate.scaling import PAYING_SHARE, Scaling, ScalingPoint

COLUMNS = ("ranks", "nodes", "rows", "step s", "network s", "tokens/s", "of linear", "save every", "lost")


def build_scaling_table(scaling: Scaling) -> Table:
    """Each world in a line."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)  # 80 characters at most
    for head in COLUMNS:
        table.add_column(head, justify="right", no_wrap=head == "tokens/s")
    for point in scaling.points:
        setup, speed = point.setup, point.speed
        table.add_row(
            f"{point.world:,}", f"{point.nodes:,}", f"{setup.step_tokens // setup.length:,}",
            f"{speed.step_s:.3f}", f"{speed.parts['reduction']:.4f}", f"{speed.tokens_per_s:,.0f}",
            f"{point.efficiency:.1%}", *_format_cadence(point),
        )  # fmt: skip
    return table


def _format_cadence(point: ScalingPoint) -> tuple[str, str]:
    """(steps between two checkpoints, share of time that is lost)."""
    if point.cadence is None:
        return "", ""
    steps = max(1, round(point.cadence.every_s / point.speed.step_s))
    return f"{steps:,}", f"{point.cadence.lost_share:.2%}"


def write_scaling_advice(scaling: Scaling) -> Iterator[str]:
    """What the table says, a sentence each."""
    smallest, largest, last = scaling.points[0], scaling.points[-1], scaling.last_that_pays
    rule = f"{PAYING_SHARE:.0%} of what one does on {smallest.world:,}"
    if len(scaling.points) > 1 and last is largest:
        yield f"it pays up to {last.world:,} ranks, the most of the table: each added one brings at least {rule}"
    elif len(scaling.points) > 1:
        yield f"it stops to pay beyond {last.world:,} ranks: those added after them bring less than {rule}"
    if smallest.setup.step_tokens != largest.setup.step_tokens:
        yield (
            "the rows of a step grow with the ranks (batch.accumulation): more ranks need fewer steps for as many "
            "tokens, and learn otherwise; set batch.rows_per_step to keep them"
        )
    too_large = [f"{point.world:,}" for point in scaling.points if not point.fits]
    if too_large:
        yield f"does not fit the memory of a rank: on {', '.join(too_large)} ranks"
    for world, why in scaling.skipped.items():
        yield f"left out: {world:,} ranks: {why}"
    if scaling.costs is not None:
        yield _describe_costs(scaling.costs)


def _describe_costs(costs: FailureCosts) -> str:
    return (
        f"failures: a node fails every {costs.node_mtbf_s / 3600:,.0f} hours (--node-mtbf; by default as of Llama 3's "
        f"16,384 GPUs), a checkpoint pauses {costs.pause_s:.2f} s (copied with {CHECKPOINT_COPY / GB:.0f} GB/s) and "
        f"counts {costs.publish_s:.1f} s later (written with {CHECKPOINT_WRITE / GB:.0f} GB/s), a restart takes "
        f"{costs.restart_s:.0f} s; all but the first are guesses. `save every`, in steps, is checkpoint.every by "
        "Daly (2006)"
    )
