"""`smoltrain report`: from a run folder to RUN/report.html. The run may go on meanwhile: that file alone is written."""

import math
import time
from pathlib import Path

from smoltrain.files import report_unwritable, write_text_file
from smoltrain.report.charts import open_charts
from smoltrain.report.page import Fact, Page, render_report_page
from smoltrain.report.read_run import RunRecords, read_run_records
from smoltrain.report.record_sections import (
    format_time,
    make_config_section,
    make_environment_section,
    make_events_section,
    make_ledger_section,
    make_samples_section,
)
from smoltrain.report.training_sections import (
    make_data_section,
    make_family_sections,
    make_gradients_section,
    make_speed_section,
    make_training_section,
)
from smoltrain.run.axis_ticks import format_number, format_short
from smoltrain.run.step_axis import StepAxis
from smoltrain.run.summary import RunSummary, format_seconds
from smoltrain.version import VERSION

REPORT_FILE = "report.html"
RECENT_STEPS = 50  # whose mean is the training loss among the headline numbers


def write_run_report(folder: Path, out: Path | None = None) -> Path:
    """Write the page, by default to RUN/report.html, into a folder as report.html; where it is.

    Errors: UserError for a run without a step, a config or records that cannot be read, and a path that cannot be
    written.
    """
    path = out or folder
    if path.is_dir():
        path = path / REPORT_FILE
    html = render_report_page(build_report_page(read_run_records(folder), time.time()))
    with report_unwritable("the report", "a path that can be", "OUT"):
        write_text_file(path, html)
    return path


def build_report_page(records: RunRecords, now_s: float) -> Page:
    """All of the page; `now_s` is when it is written."""
    metrics = records.metrics
    axis = StepAxis(records.plan, metrics.first_step or 1, metrics.last_step)
    charts = open_charts(metrics, axis)
    sections = [
        make_training_section(records, charts),
        make_gradients_section(charts),
        make_speed_section(records, charts),
        make_data_section(records, charts),
        *make_family_sections(charts),
        make_samples_section(records),
        make_events_section(records),
        make_config_section(records),
        make_ledger_section(records),
        make_environment_section(records),
    ]
    config = records.config
    summary = records.summary
    assert summary is not None, "who reads the records reads the metrics"
    origin = f"recipe {config.run.recipe}" if config.run.recipe else "no recipe"
    return Page(
        title=records.folder.resolve().name,
        subtitle=f"{origin}, {config.optimizer.kind}, {config.tokenizer.name} tokenizer",
        state=_describe_state(records, summary, now_s),
        progress=min(1.0, summary.step / summary.last_step),
        facts=list_facts(records, summary),
        sections=[section for section in sections if not section.is_empty],
        damage=records.damage,
        footer=f"Written by smoltrain {VERSION} at {format_time(now_s)} UTC. Nothing on this page is loaded from "
        "elsewhere. Losses are in nats per token.",
    )


def _describe_state(records: RunRecords, summary: RunSummary, now_s: float) -> str:
    done = "the plan is complete" if summary.step >= summary.last_step else "not complete"
    text = f"Step {summary.step:,} of {summary.last_step:,}, {done}"
    if records.last_time_s is None:
        return f"{text}."
    ago = format_seconds(max(0.0, now_s - records.last_time_s))
    return f"{text}; last sign of life {ago} before this page was written, at {format_time(records.last_time_s)} UTC."


def list_facts(records: RunRecords, summary: RunSummary) -> list[Fact]:
    """The headline numbers, as far as they are known."""
    facts: list[Fact] = []
    if summary.last_loss:
        step, loss, bits_per_byte = summary.last_loss
        detail = f"at step {step:,}"
        if math.isfinite(bits_per_byte):
            detail += f", {bits_per_byte:.3f} bits per byte"
        facts.append(Fact("Validation loss", format_number(loss), detail))
    if summary.best_loss and summary.last_loss and summary.best_loss[0] != summary.last_loss[0]:
        facts.append(
            Fact("Best validation loss", format_number(summary.best_loss[1]), f"at step {summary.best_loss[0]:,}")
        )
    _, losses = records.metrics.series("train/loss_nats_per_token")
    if len(losses):
        recent = losses[-RECENT_STEPS:]
        detail = f"mean of the last {len(recent)} steps" if len(recent) > 1 else "of one step"
        facts.append(Fact("Training loss", format_number(float(recent.mean())), detail))
    if records.num_parameters is not None:
        facts.append(Fact("Parameters", format_short(records.num_parameters), f"{records.num_parameters:,}"))
    tokens = records.metrics.last("data/tokens") or summary.num_tokens
    epochs = f"{summary.num_epochs:,.2f} epochs" if summary.num_epochs is not None else ""
    facts.append(Fact("Tokens", format_short(tokens), epochs))
    if summary.times:
        starts = f"{summary.times.num_starts} start{'s' * (summary.times.num_starts > 1)}"
        facts.append(Fact("Wall time", format_seconds(summary.times.wall_s), starts))
    if summary.step_s:
        facts.append(
            Fact("Tokens per second", f"{summary.num_tokens / summary.step_s:,.0f}", "in the steps, all ranks")
        )
    if summary.mfu is not None:
        facts.append(Fact("MFU", f"{summary.mfu:.1%}", "in the steps"))
    _, peaks = records.metrics.series("memory/peak_gib")  # each start's processes have their own
    if len(peaks):
        facts.append(Fact("Peak memory", f"{peaks.max():.2f} GiB", "of the largest rank"))
    repeat = records.metrics.last("data/repeat_factor")
    if repeat is not None:
        facts.append(Fact("Repeat factor", f"{repeat:.2f}", "rows over unique rows"))
    return facts
