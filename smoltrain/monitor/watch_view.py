"""The lines of `smoltrain watch`, for a terminal of any size: what matters least is left out first."""

from collections.abc import Sequence

from rich.cells import cell_len
from rich.text import Text

from smoltrain.monitor.chart import draw_chart
from smoltrain.monitor.run_reader import RunReader
from smoltrain.monitor.runs_table import STATE_STYLES, format_age
from smoltrain.run.run_folder import SAMPLES_FILE
from smoltrain.run.screen import cut_sample
from smoltrain.run.summary import format_seconds
from smoltrain.terminal import replace_control_characters, wrap_words

CURVE_STYLE = "cyan"
MARK_STYLE = "bold yellow"
LABEL_CELLS = 8  # of the axis to the left of the curve
CHART_ROWS = (3, 14)  # at least and at most
MIN_CHART_CELLS = 8
BAR_CELLS = 40  # at most
MAX_WARNINGS = 3
WARNING_LINES = 2  # of each
GAP = "   "
# What a line of numbers shows: name in metrics.jsonl, label, format. Throughput is a mean and stands apart.
NUMBERS = (
    ("train/loss_nats_per_token", "loss", "{:.4f}"),
    ("validation/loss_nats_per_token", "validation", "{:.4f}"),
    ("validation/best_loss_nats_per_token", "best", "{:.4f}"),
    ("train/lr", "lr", "{:.2e}"),
    ("train/grad_norm_before_clipping", "grad norm", "{:.3f}"),
    ("speed/mfu", "MFU", "{:.1%}"),
    ("memory/peak_gib", "memory", "{:.2f} GiB"),
    ("speed/data_wait_share", "waiting for data", "{:.1%}"),
    ("data/tokens", "tokens", "{:,}"),
    ("data/epochs", "epochs", "{:.3f}"),
    ("train/skipped_updates", "skipped updates", "{:,}"),
)


def draw_view(run: RunReader, now_s: float, width: int, height: int, *, braille: bool, trouble: str = "") -> list[Text]:
    """The lines of a run, at most `width` cells wide and `height` of them; `trouble` is why the last look failed."""
    head = [*_draw_headline(run, now_s, width), *_draw_progress(run, now_s, width, braille=braille)]
    for text in filter(None, (run.config_damage, trouble)):
        head += _wrap(text, width, "red")
    head += [Text(line) for line in flow_words(list_numbers(run), width)]
    warnings = _draw_warnings(run, width)
    sample = _draw_sample(run, width)
    room = height - len(head) - CHART_ROWS[0] - 2  # the curve's headings
    if len(warnings) > room:
        warnings = []
    if len(warnings) + len(sample) > room:
        sample = []
    rows = min(CHART_ROWS[1], height - len(head) - len(warnings) - len(sample) - 2)
    chart = _draw_losses(run, width, rows, braille=braille) if rows >= CHART_ROWS[0] else []
    return [*head, *chart, *warnings, *sample][:height]


def draw_waiting(source: str, there_are: str, width: int) -> list[Text]:
    """What is shown of a run that is not there yet."""
    text = f"waiting for the run {source!r}: there is none yet. It may be {there_are}. Ctrl-C leaves."
    return _wrap(text, width)


def list_numbers(run: RunReader) -> list[str]:
    """What is known of the last step, each with its name."""
    words: list[str] = []
    for name, label, shape in NUMBERS:
        value = run.numbers.get(name)
        if isinstance(value, int | float) and not (name == "train/skipped_updates" and not value):
            words.append(f"{label} {shape.format(value)}")
        if name == "train/grad_norm_before_clipping" and run.tokens_per_s is not None:
            words.append(f"{run.tokens_per_s:,.0f} tokens/s")
    if run.num_spikes:
        words.append(f"spikes {run.num_spikes:,}")
    return words


def flow_words(words: Sequence[str], width: int) -> list[str]:
    """The words in lines of at most so many cells; none is broken, unless it is longer than a line."""
    lines: list[str] = []
    for word in words:
        if lines and cell_len(lines[-1]) + len(GAP) + cell_len(word) <= width:
            lines[-1] += GAP + word
        else:
            lines.append(word[:width])
    return lines


def _draw_headline(run: RunReader, now_s: float, width: int) -> list[Text]:
    line = Text(replace_control_characters(run.folder.name), style="bold")
    line.append(GAP)
    line.append(run.state.state, style=STATE_STYLES[run.state.state])
    if run.phase:
        line.append(f"{GAP}phase {replace_control_characters(run.phase)}")
    if "time_s" in run.newest:
        line.append(f"{GAP}last line {format_age(now_s - run.newest['time_s'])}")
    line.truncate(width, overflow="ellipsis")
    return [line, *(_wrap(run.state.note, width, "dim") if run.state.note else [])]


def _draw_progress(run: RunReader, now_s: float, width: int, *, braille: bool) -> list[Text]:
    """A bar, steps, share, time left."""
    if run.last_step is None:
        return []
    share = min(1.0, run.step / run.last_step)
    text = f"{run.step:,}/{run.last_step:,}  {share:.1%}"
    left_s = run.estimate_left_s(now_s)
    if left_s is not None:
        text += f"  left {format_seconds(left_s)}"
    cells = min(BAR_CELLS, width - cell_len(text) - 2)
    line = Text(text)
    if cells >= MIN_CHART_CELLS:
        done = round(share * cells)
        full, empty = ("━", "─") if braille else ("=", "-")
        line = Text.assemble((full * done, "green"), (empty * (cells - done), "dim"), f"  {text}")
    line.truncate(width, overflow="ellipsis")
    return [line]


def _draw_losses(run: RunReader, width: int, rows: int, *, braille: bool) -> list[Text]:
    """The curve of the losses, with its headings: `rows` + 2 lines; [] where there is nothing to draw."""
    cells = width - LABEL_CELLS - 2
    if cells < MIN_CHART_CELLS:
        return []
    chart = draw_chart(run.losses, run.validations, cells, rows, braille=braille)
    if chart is None:
        return []
    mark = "●" if braille else "o"
    title = Text.assemble("loss, nats per token: ", ("training", CURVE_STYLE))
    if run.validations:
        title.append(f", validation {mark}", style=MARK_STYLE)
    title.truncate(width, overflow="ellipsis")
    lines = [title]
    for number, row in enumerate(chart.rows):
        label = {0: f"{chart.top:.4g}", rows - 1: f"{chart.bottom:.4g}"}.get(number, "")
        line = Text(f"{label:>{LABEL_CELLS}} {'│' if braille else '|'}")
        for cell in row:
            line.append(cell.character, style=MARK_STYLE if cell.is_mark else CURVE_STYLE)
        lines.append(line)
    first = f"step {chart.first_step:,}"
    last = f"{chart.last_step:,}"
    axis = Text(f"{' ' * (LABEL_CELLS + 2)}{first}{last:>{max(1, cells - len(first))}}", style="dim")
    axis.truncate(width)
    return [*lines, axis]


def _draw_warnings(run: RunReader, width: int) -> list[Text]:
    """The newest warnings of rank 0's log; a long one is cut."""
    lines: list[Text] = []
    for warning in run.warnings[-MAX_WARNINGS:]:
        lines += _wrap(warning, width, "yellow")[:WARNING_LINES]
    return lines


def _draw_sample(run: RunReader, width: int) -> list[Text]:
    """The newest text that the model wrote."""
    if run.sample is None:
        return []
    text = f"{run.sample['prompt']}{run.sample['text']}"
    lines = [f"sample at step {run.sample['step']:,}:", *cut_sample(text, max(8, width), SAMPLES_FILE)]
    return [Text(line[:width]) for line in lines]


def _wrap(text: str, width: int, style: str = "") -> list[Text]:
    return [Text(line, style=style) for line in wrap_words(replace_control_characters(text), max(1, width))]
