"""The sections that are lists: samples, events, ledger, config, environment."""

import datetime
from collections.abc import Sequence
from typing import Any

from smoltrain.report.page import PageSection, SampleRow, Table
from smoltrain.report.read_run import RunRecords
from smoltrain.run.axis_ticks import format_number
from smoltrain.schedule import Plan

MAX_SAMPLES = 8  # of a prompt, from the first to the last
MAX_EVENTS = 60  # of a kind: the first and the last ones


def make_samples_section(records: RunRecords) -> PageSection:
    """What the model wrote after each prompt, step by step, side by side."""
    by_prompt: dict[str, list[tuple[int, str]]] = {}
    for line in records.samples:
        by_prompt.setdefault(str(line["prompt"]), []).append((line["step"], str(line["text"])))
    rows = [SampleRow(prompt, pick_spread(texts, MAX_SAMPLES)) for prompt, texts in by_prompt.items()]
    is_cut = any(len(texts) > MAX_SAMPLES for texts in by_prompt.values())
    notes = [f"{MAX_SAMPLES} of the steps; all of them are in samples.jsonl."] if is_cut else []
    return PageSection("Samples", notes, samples=rows)


def make_events_section(records: RunRecords) -> PageSection:
    """Starts and the worlds they ran on, spikes, warnings, hangs."""
    notes: list[str] = []
    if records.num_undone:
        notes.append(f"{records.num_undone:,} steps were done again, after a kill or a rewind.")
    notes += [f"A rank hung: logs/{name} has its stack." for name in records.hang_reports]
    tables = [_list_starts(records)] if records.starts else []
    if records.spikes:
        tables.append(_list_spikes(records.spikes))
    if records.warnings:
        rows = [[warning.time, warning.text, format_number(warning.count)] for warning in records.warnings]
        heads = ["first at (clock of the log)", "warning", "times"]
        tables.append(Table(heads, *_cut(rows, "Warnings of rank 0"), num_text_columns=2))
    else:
        notes.append("The log of rank 0 has no warning.")
    return PageSection("Events", notes, tables=tables)


def _list_starts(records: RunRecords) -> Table:
    rows: list[list[str]] = []
    ranks_before: Any = None
    for start in records.starts:
        ranks = start.get("ranks")
        step = start.get("from_step")
        facts = [] if ranks_before in (None, ranks) else [f"{ranks_before} ranks before"]
        facts += [str(change) for change in start.get("changes") or () if not is_about_start(str(change))]
        if "lost" in start:
            facts.append(f"lost: {start['lost']}")
        what = name_start(records.plan, step)
        time = str(start.get("time", "-")).replace("T", " ").removesuffix("+00:00")
        rows.append([time, what, "; ".join(facts) or "-", _show(step), _show(ranks)])
        ranks_before = ranks
    heads = ["time (UTC)", "event", "what changed", "after step", "ranks"]
    return Table(heads, *_cut(rows, "Starts"), num_text_columns=3)


def name_start(plan: Plan, step: Any) -> str:
    """What a start after so many steps is: each phase begins with one, the others go on after a stop or a crash."""
    if not step:
        return "start"
    begun = [phase.name for phase in plan.phases if phase.first - 1 == step]
    return f"phase {begun[0]}" if begun else "resume"


def is_about_start(change: str) -> bool:
    """Whether a difference of two configs only says up to where a start trains, and under which name."""
    return change.startswith(("run.stop_after", "run.name", "run.recipe"))


def _list_spikes(spikes: Sequence[dict[str, Any]]) -> Table:
    rows = [
        [
            format_time(spike.get("time_s")),
            str(spike["does"]),
            f"{spike.get('why', '')} {spike.get('about', '')}".strip(),
            _show(spike["step"]),
            _show(spike.get("loss")),
        ]
        for spike in spikes
    ]
    return Table(["time (UTC)", "done", "why", "step", "loss"], *_cut(rows, "Spikes"), num_text_columns=3)


def make_config_section(records: RunRecords) -> PageSection:
    """The whole config, and in what it differs from its recipe."""
    name = records.config.run.recipe
    tables: list[Table] = []
    notes = [f"Not compared with its recipe: {records.recipe_note}."] if records.recipe_note else []
    changes = [change for change in records.recipe_changes if not is_about_start(change.key)]
    if changes:
        rows = [[key, repr(before), repr(now)] for key, before, now in changes]
        caption = f"Changed from the recipe {name}, as it is shipped now"
        tables.append(Table(["key", "recipe", "run"], rows, caption, num_text_columns=3))
    elif not notes:
        notes.append(f"As the recipe {name} is shipped now, without a change.")
    return PageSection("Config", notes, tables=tables, folded=[("config.yaml", records.config_text)])


def make_ledger_section(records: RunRecords) -> PageSection:
    """Whether the rows that were trained on are those that the metrics tell of."""
    chain = records.metrics.last_texts.get("data/ledger", "-")
    rows = [["ledger.bin", records.ledger], ["digest of every row so far", chain]]
    return PageSection("Ledger", tables=[Table(["", ""], rows, num_text_columns=2)])


def make_environment_section(records: RunRecords) -> PageSection:
    """What was chosen on that machine, and the versions of the last start."""
    tables: list[Table] = []
    if records.choices:
        rows = [[what, value] for what, value in records.choices.items()]
        tables.append(Table(["", ""], rows, "Chosen by the last start that ended, with its reason", num_text_columns=2))
    last = records.starts[-1] if records.starts else {}
    versions = last.get("versions")
    rows = [[str(name), str(version)] for name, version in versions.items()] if isinstance(versions, dict) else []
    if "git_commit" in last:
        rows.insert(0, ["smoltrain, git commit", str(last["git_commit"])])
    if rows:
        tables.append(Table(["", ""], rows, "Versions of the last start", num_text_columns=2))
    return PageSection("Environment", tables=tables)


def pick_spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many, from the first to the last, evenly."""
    if len(items) <= most:
        return list(items)
    return [items[round(number * (len(items) - 1) / (most - 1))] for number in range(most)]


def format_time(seconds: Any) -> str:
    """A moment in UTC; a dash for what is none."""
    try:
        moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    except (TypeError, ValueError, OverflowError, OSError):
        return "-"
    return moment.isoformat(sep=" ", timespec="seconds").removesuffix("+00:00")


def _cut(rows: list[list[str]], caption: str) -> tuple[list[list[str]], str]:
    """The first and the last of many rows, and a caption that says so."""
    if len(rows) <= MAX_EVENTS:
        return rows, caption
    half = MAX_EVENTS // 2
    return rows[:half] + rows[-half:], f"{caption}: the first and the last {half} of {len(rows):,}"


def _show(value: Any) -> str:
    """A number, or whatever else stands in its place."""
    return format_number(value) if isinstance(value, int | float) else str("-" if value is None else value)
