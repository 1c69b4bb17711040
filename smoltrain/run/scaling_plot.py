"""An estimate of several worlds as a PNG file: tokens/s, and the efficiency."""

from pathlib import Path

from smoltrain.estimate.scaling import Scaling
from smoltrain.run.plots import BLUE, GREEN, GREY, ORANGE


def draw_scaling(scaling: Scaling, path: Path) -> None:
    """Draw tokens/s against ranks, as estimated, after failures, and in proportion; below it the efficiency."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    figure = Figure(figsize=(8, 6), dpi=140, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    worlds = [point.world for point in scaling.points]
    first = scaling.points[0]
    by_rank = first.speed.tokens_per_s / first.world
    upper.plot(worlds, [by_rank * world for world in worlds], "--", color=GREY, linewidth=1.2, label="in proportion")
    upper.plot(worlds, [point.speed.tokens_per_s for point in scaling.points], "o-", color=BLUE, label="estimated")
    if scaling.costs is not None:
        kept = [point.kept_tokens_per_s for point in scaling.points]
        upper.plot(worlds, kept, "o-", color=ORANGE, markersize=4, label="after failures and checkpoints")
    last = scaling.last_that_pays
    if last.world < worlds[-1]:
        for axes in (upper, lower):
            axes.axvline(last.world, color=GREEN, linewidth=1.0, linestyle=(0, (4, 3)))
        upper.plot([], [], color=GREEN, linestyle=(0, (4, 3)), label=f"more than {last.world:,} ranks do not pay")
    upper.set(xscale="log", yscale="log", ylabel="tokens/s, all ranks")
    lower.plot(worlds, [100 * point.efficiency for point in scaling.points], "o-", color=BLUE)
    lower.set(ylabel="efficiency, %", xlabel="ranks", ylim=(0, None))
    lower.xaxis.set_major_locator(FixedLocator(worlds))
    lower.xaxis.set_minor_locator(NullLocator())
    lower.set_xticklabels([f"{world:,}" for world in worlds])
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e3e6e9")
    upper.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
