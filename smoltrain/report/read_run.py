"""All that a run folder tells, read once: metrics, ledger, samples, journal, logs, data, config. Nothing is written.

Whatever of it is not there (an older version, a run that has just begun) is left out; what is damaged is said.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from smoltrain.checkpoint.identity import ConfigDifference, find_config_differences
from smoltrain.config.config_file import CONFIG_FILE, find_config_damage, read_provenance
from smoltrain.config.load import list_recipes, read_run_config
from smoltrain.config.schema import Config
from smoltrain.config.yaml_text import read_yaml
from smoltrain.data.documents.bad_records import BAD_RECORDS_FILE
from smoltrain.data.tokens.index import DataIndex, data_index_file, read_data_index
from smoltrain.errors import UserError
from smoltrain.files import METRICS_FILE, read_jsonl, read_text_file
from smoltrain.run.row_ledger import open_row_history
from smoltrain.run.run_folder import SAMPLES_FILE, SPIKES_FILE
from smoltrain.run.run_metrics import RunMetrics, no_step_error
from smoltrain.run.run_title import count_run_parameters
from smoltrain.run.summary import RunSummary, keep_summed_up, summarise_lines
from smoltrain.run.track import SAMPLE_KEYS, read_choices
from smoltrain.run.wandb_id import UNDONE_METRICS_FILE
from smoltrain.schedule import Plan

# A line of a rank's log, as rank_log.open_rank_log has it; the other lines of a text (a sample) have no time in front.
LOG_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ smoltrain (\w+) (.*)")
MAX_WARNINGS = 200  # different ones that are kept
MAX_BAD_RECORDS = 20  # that are shown


@dataclass(frozen=True)
class LogWarning:
    """A warning of logs/rank0.log, once."""

    time: str  # of the first one, as the log has it
    text: str
    count: int


@dataclass
class RunRecords:
    """A run folder in memory."""

    folder: Path
    config: Config
    plan: Plan
    config_text: str
    num_parameters: int | None
    starts: list[dict[str, Any]] = field(default_factory=list)  # of its provenance
    metrics: RunMetrics = field(default_factory=RunMetrics)
    last_time_s: float | None = None  # of the newest line
    summary: RunSummary | None = None  # of a run that has trained a step
    samples: list[dict[str, Any]] = field(default_factory=list)
    spikes: list[dict[str, Any]] = field(default_factory=list)
    num_undone: int = 0  # steps that were done again
    num_bad_records: int = 0  # of those that were found before the run
    bad_records: list[dict[str, Any]] = field(default_factory=list)  # the first of them
    warnings: list[LogWarning] = field(default_factory=list)
    choices: dict[str, str] = field(default_factory=dict)  # what was chosen, with its reason
    hang_reports: list[str] = field(default_factory=list)  # names of files
    index: DataIndex | None = None
    ledger: str = ""
    recipe_note: str = ""  # where the config is not compared with its recipe, why
    recipe_changes: list[ConfigDifference] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)  # what could not be read, in words


def read_run_records(folder: Path) -> RunRecords:
    """Errors: UserError for a run without a line of metrics, or whose config cannot be read."""
    path = folder / CONFIG_FILE
    config = read_run_config(path)
    records = RunRecords(folder, config, Plan(config.phases), read_text_file(path), count_run_parameters(folder))
    damage = find_config_damage(folder)
    if damage:
        records.damage.append(damage)
    try:
        records.starts = read_provenance(path)["starts"]
    except UserError as error:
        records.damage.append(str(error.problems[0]))
    _read_metrics(records)
    _read_ledger(records)
    say = records.damage.append
    records.samples = list(read_jsonl(folder / SAMPLES_FILE, SAMPLE_KEYS, say))
    records.spikes = list(read_jsonl(folder / SPIKES_FILE, ("step", "does"), say))
    undone = read_jsonl(folder / UNDONE_METRICS_FILE, say=say)
    records.num_undone = sum("train/loss_nats_per_token" in line for line in undone)
    for record in read_jsonl(folder / "data" / BAD_RECORDS_FILE, ("source",), say):
        records.num_bad_records += 1
        if records.num_bad_records <= MAX_BAD_RECORDS:
            records.bad_records.append(record)
    logs = folder / "logs"
    records.choices = read_choices(logs / "choices.json")
    records.warnings = read_warnings(logs / "rank0.log")
    records.hang_reports = sorted(path.name for path in logs.glob("hang-rank*.txt"))
    _read_data_index(records)
    _compare_with_recipe(records)
    return records


def _read_metrics(records: RunRecords) -> None:
    """Once through the file, which is the largest of all."""
    lines: list[dict[str, Any]] = []
    for line in read_jsonl(records.folder / METRICS_FILE, say=records.damage.append):
        records.metrics.add(line)
        kept = keep_summed_up(line)
        if len(kept) > 2:  # more than step and time
            lines.append(kept)
    records.last_time_s = records.metrics.last("time_s")
    if records.metrics.first_step is None:
        raise no_step_error(records.folder)
    records.summary = summarise_lines(records.plan, records.folder, lines)


def _read_ledger(records: RunRecords) -> None:
    metrics = records.metrics
    steps, rows = metrics.series("data/rows")
    try:
        history = open_row_history(records.folder, steps, rows, metrics.last_texts.get("data/ledger", ""), None)
    except UserError as error:
        records.ledger = f"not there: {error.problems[0].saw}"
        return
    mismatch = history.find_mismatch()
    records.ledger = f"{mismatch}" if mismatch else f"{len(history.digests):,} rows, as the metrics say"
    if mismatch:
        records.damage.append(mismatch)


def _read_data_index(records: RunRecords) -> None:
    file = data_index_file(records.folder)
    if not file.exists():
        return
    try:
        records.index = read_data_index(file)
    except UserError as error:
        records.damage.append(str(error.problems[0]))


def _compare_with_recipe(records: RunRecords) -> None:
    """With the shipped recipe as it is now, as nothing keeps the one of a user, or of then."""
    name = records.config.run.recipe
    path = list_recipes().get(name)
    if path is None:
        records.recipe_note = f"no recipe {name!r} is shipped to compare with" if name else "it began without a recipe"
        return
    try:
        values = read_yaml(path)
        run = values.setdefault("run", {})
        recipe = Config.model_validate(values | {"run": {"name": name, "recipe": name} | run})
    except (UserError, ValidationError) as error:
        records.recipe_note = f"the recipe {name!r} cannot be read ({type(error).__name__})"
        return
    records.recipe_changes = find_config_differences(recipe, records.config)


def read_warnings(log: Path) -> list[LogWarning]:
    """What a log warns of, each text once, in the order in which they came. Nothing where there is no log."""
    try:
        with log.open(encoding="utf-8", errors="replace") as file:
            return _collect_warnings(file)
    except OSError:
        return []


def _collect_warnings(lines: Iterable[str]) -> list[LogWarning]:
    found: dict[str, LogWarning] = {}
    for line in lines:
        match = LOG_LINE.match(line)
        if match is None:
            continue
        time, level, text = match.groups()
        is_warning = level in ("WARNING", "ERROR", "CRITICAL") or text.startswith("WARNING")
        if is_warning and (text in found or len(found) < MAX_WARNINGS):
            before = found.get(text, LogWarning(time, text, 0))
            found[text] = LogWarning(before.time, text, before.count + 1)
    return list(found.values())
