"""The sections that are drawn from a run's metrics: training, gradients, speed, data, and what else was measured."""

from collections.abc import Iterator

from smoltrain.report.charts import Charts, HeatMap, LineChart
from smoltrain.report.page import PageSection, Share, Table
from smoltrain.report.read_run import RunRecords
from smoltrain.run.axis_ticks import format_number
from smoltrain.run.summary import format_seconds
from smoltrain.run.track import CUSTOM_PREFIX, GRADIENT_NORM_PREFIX, SOURCE_TOKENS_PREFIX

# Sections of whatever is logged under these, a chart for each name or a row for each layer.
FAMILIES = {
    "Evaluation": ("evaluation/",),
    "Memorisation": ("memorisation/",),
    "Weights and updates": ("weights/", "updates/"),
    "Custom metrics": (CUSTOM_PREFIX,),
}
MAX_CHARTS = 24  # of a family
MIN_HEAT_ROWS = 4  # names below one prefix, from which on they are a heat map
COLORS = "abcde"


def make_training_section(records: RunRecords, charts: Charts) -> PageSection:
    """Loss and validation, learning rate, gradient norm, what was skipped."""
    tokens = charts.axis.ticks_of(*records.metrics.series("data/tokens"), count=5)
    loss = charts.draw_lines(
        "Loss, nats per token",
        charts.series("train/loss_nats_per_token", "training", "a", is_noisy=True),
        charts.series("validation/loss_nats_per_token", "validation", "b", has_dots=True),
        is_log=True,
        height=300,
        token_ticks=tokens,
    )
    norm = "Gradient norm before clipping"
    small = [
        charts.draw_name("Learning rate", "train/lr", "d", from_zero=True),
        charts.draw_name(norm, "train/grad_norm_before_clipping", "c", is_log=True, is_noisy=True),
        charts.draw_name("Validation, bits per byte", "validation/bits_per_byte", "b", has_dots=True),
        charts.draw_name("Weight decay", "train/weight_decay", "d", from_zero=True),
    ]
    for name, title in (("train/skipped_updates", "Skipped updates"), ("train/loss_scale", "Loss scale (fp16)")):
        if len(set(charts.metrics.series(name)[1].tolist())) > 1:  # neither says anything where nothing happens
            small.append(charts.draw_name(title, name, "d", from_zero=True))
    notes = [] if charts.axis.is_even else ["Short phases are drawn wider than they are."]
    return PageSection("Training", notes, charts.axis.stretches, [loss, *small])


def make_gradients_section(charts: Charts) -> PageSection:
    """Norms by layer."""
    heat = charts.draw_heat_map("Gradient norm of each layer before clipping", GRADIENT_NORM_PREFIX)
    return PageSection("Gradients by layer", charts=[heat])


def make_speed_section(records: RunRecords, charts: Charts) -> PageSection:
    """Throughput, MFU, waiting, memory, and where the time went."""
    waiting = "Waiting for rows, % of a step"
    drawn = [
        charts.draw_name("Tokens per second", "speed/tokens_per_s", "a", from_zero=True, is_noisy=True),
        charts.draw_name("MFU, % of the peak", "speed/mfu", "c", factor=100, from_zero=True, is_noisy=True),
        charts.draw_name(waiting, "speed/data_wait_share", "b", factor=100, from_zero=True, is_noisy=True),
        charts.draw_name("Peak memory, GiB", "memory/peak_gib", "e", from_zero=True),
    ]
    shares: list[Share] = []
    notes: list[str] = []
    times = records.summary.times if records.summary else None
    if times and times.wall_s:
        parts = sorted(times.parts.items(), key=lambda part: -part[1])
        shares = [Share(part, s / times.wall_s, format_seconds(s)) for part, s in parts if s]
        starts = f"{times.num_starts} start{'s' * (times.num_starts > 1)}"
        notes.append(f"Where {format_seconds(times.wall_s)} of {starts} went; the time between starts is not in it.")
    return PageSection("Speed and memory", notes, charts=drawn, shares=shares)


def make_data_section(records: RunRecords, charts: Charts) -> PageSection:
    """How much of the data was seen, how often, and what could not be read."""
    names = charts.metrics.names(SOURCE_TOKENS_PREFIX)
    by_source = [
        charts.series(name, name.removeprefix(SOURCE_TOKENS_PREFIX), COLORS[number % len(COLORS)])
        for number, name in enumerate(names)
    ]
    drawn = [
        charts.draw_lines(
            "Rows",
            charts.series("data/rows", "consumed", "b"),
            charts.series("data/unique_rows", "unique", "a"),
            from_zero=True,
        ),
        charts.draw_name("Repeat factor, rows over unique rows", "data/repeat_factor", "c"),
        charts.draw_name("Unique documents", "data/unique_documents", "e", from_zero=True),
        charts.draw_lines("Tokens by source", *by_source, from_zero=True),
    ]
    tables = [*_list_sources(records), *_list_bad_records(records)]
    num_streamed = records.metrics.last("data/bad_records") or 0
    notes = [f"{num_streamed:,.0f} records were skipped in streams."] if num_streamed else []
    return PageSection("Data", notes, charts=drawn, tables=tables)


def _list_sources(records: RunRecords) -> Iterator[Table]:
    data = records.config.data
    where = {source.name: (source, source.weight) for source in data.sources} or {"data": (data, None)}
    rows: list[list[str]] = []
    for name, (source, weight) in where.items():
        place = f"package {source.package}" if source.package else source.path or f"Hub {source.hub}"
        row = [name, str(place), format_number(weight)]
        index = records.index.sources.get(name) if records.index else None
        side = index.train if index else None
        counts = (
            records.metrics.last(SOURCE_TOKENS_PREFIX + name) if data.sources else records.metrics.last("data/tokens"),
            side and side.tokens,
            side and side.documents,
            index and index.bad_records,
            index and index.empty_records,
            index and index.copies,
            index and index.repeated,
        )
        rows.append([*row, *(format_number(count) for count in counts)])
    heads = ["source", "from", "weight", "tokens trained on", "tokens", "documents", "bad", "empty", "held-out copies"]
    yield Table([*heads, "repeated"], rows, "Sources", num_text_columns=2)


def _list_bad_records(records: RunRecords) -> Iterator[Table]:
    if not records.num_bad_records:
        return
    rows = [[str(bad.get(key, "")) for key in ("source", "place", "why")] for bad in records.bad_records]
    shown = f", the first {len(rows)}" if len(rows) < records.num_bad_records else ""
    caption = f"{records.num_bad_records:,} records were not read before the run{shown}"
    yield Table(["source", "place", "why"], rows, caption, num_text_columns=3)


def make_family_sections(charts: Charts) -> Iterator[PageSection]:
    """What is logged under FAMILIES."""
    for title, prefixes in FAMILIES.items():
        drawn: list[LineChart | HeatMap | None] = []
        groups: dict[str, list[str]] = {}
        for prefix in prefixes:
            for name in charts.metrics.names(prefix):
                groups.setdefault(name.rpartition("/")[0] + "/", []).append(name)
        for group, names in groups.items():
            is_by_layer = len(names) >= MIN_HEAT_ROWS and any(name.startswith(f"{group}layers.") for name in names)
            if is_by_layer:
                drawn.append(charts.draw_heat_map(group.rstrip("/"), group))
            else:
                drawn += [charts.draw_name(name, name, is_noisy=True, has_dots=True) for name in names]
        left_out = len(drawn) - MAX_CHARTS
        notes = [f"{left_out} more are in metrics.jsonl."] if left_out > 0 else []
        yield PageSection(title, notes, charts=drawn[:MAX_CHARTS])
