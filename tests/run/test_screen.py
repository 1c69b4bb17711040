"""What rank 0 shows: on consoles of our own that believe to be terminals of some width, and through pipes."""

import io
import math
import os
import re
import time
from collections.abc import Callable

import pytest
from rich.cells import cell_len
from rich.console import Console

from smoltrain.run.screen import Screen, cut_sample, format_step_line, format_task_line, format_validation_line
from smoltrain.terminal import open_console
from tests.tiny import STEP_NUMBERS as NUMBERS

MORE = NUMBERS | {"speed/mfu": 0.4256, "data/tokens": 3_276_800}
REASON = (
    "blocked, faster than SDPA on a CPU with AVX512-bf16; SDPA would take a mask of all pairs of tokens, which is "
    "what makes it slow; kernels.attention=sdpa asks for it all the same"
)


@pytest.fixture(autouse=True)
def _usual_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def terminal(width: int) -> Console:
    """A console that writes as to a terminal, into memory."""
    return Console(file=io.StringIO(), width=width, force_terminal=True, highlight=False, markup=False, emoji=False)


def raw(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def lines_on(console: Console) -> list[str]:
    """What is printed, as it stands on the screen in the end, colours left out."""
    drawn = [line.split("\r\x1b[2K")[-1] for line in raw(console).split("\n")]
    return [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).strip("\r") for line in drawn]


# ---- lines that fit


def test_a_pipe_gets_every_number_of_a_step() -> None:
    assert format_step_line(7, 1000, "main", NUMBERS, 993.0) == (
        "step    7/1000 main  loss 2.3457  lr 5.00e-04  grad 1.500  12,346 tok/s  mem 3.14 GiB  wait 1.2%  left 16:33"
    )
    assert format_step_line(7, 1000, "main", MORE, 9999.0) == (
        "step    7/1000 main  loss 2.3457  lr 5.00e-04  grad 1.500  12,346 tok/s  MFU 42.6%  3.28M tokens"
        "  mem 3.14 GiB  wait 1.2%  left 2:46:39"
    )
    infinite = format_step_line(5, 5, "main", NUMBERS | {"train/grad_norm_before_clipping": math.inf}, 0.0)
    assert "  grad inf  " in infinite
    assert infinite.endswith("left 0:00")
    assert format_step_line(1, 5, "main", NUMBERS, None).endswith("left ?")


def test_a_step_leaves_out_what_matters_least_until_it_fits() -> None:
    left_out = []
    shown = format_step_line(7, 1000, "main", MORE, 993.0)
    for width in range(cell_len(shown), 0, -1):
        line = format_step_line(7, 1000, "main", MORE, 993.0, width)
        if line != shown:
            left_out += [word for word in re.findall(r"[a-zMFU]{2,}", shown) if word not in line]
            shown = line
        assert cell_len(line) <= width or line == "step    7/1000  loss 2.3457"
    assert shown == "step    7/1000  loss 2.3457", "which is never left out"
    assert [w for w in left_out if w not in ("tok", "iB")] == [
        "wait", "mem", "tokens", "left", "MFU", "lr", "grad", "main",
    ]  # fmt: skip


def test_a_validation_leaves_out_perplexity_first() -> None:
    whole = "validation at step 40: loss 5.2182, perplexity 184.6, 2.801 bits per byte, the best so far"
    assert format_validation_line(40, 5.2182, 184.6, 2.801, math.inf) == whole
    assert format_validation_line(40, 5.2182, 184.6, 2.801, 5.3, 80) == whole.replace(" perplexity 184.6,", "")
    assert format_validation_line(40, 5.2182, 184.6, 2.801, 5.1, 60).endswith("loss 5.2182, best 5.1000")
    assert format_validation_line(40, math.nan, math.nan, math.nan, math.inf).endswith("nan bits per byte")


@pytest.mark.parametrize("width", [200, 120, 80, 57, 40])
def test_no_line_is_longer_than_the_terminal_is_wide(width: int) -> None:
    console = terminal(width)
    screen = Screen(console)
    screen.say_choice("attention kernel", REASON)
    screen.say("WARNING: " + REASON)
    screen.say_step(7, 10, "continuation", MORE, 99.0)
    screen.say_validation(7, 5.2, 184.6, 2.8, math.inf)
    screen.say_sample(7, "東京" * 40 + "\n\tword " * 9, "samples.jsonl")
    screen.say_phase("phase main: " + REASON)
    widths = [cell_len(line) for line in lines_on(console)]
    assert max(widths) <= width
    assert len(widths) > 10


@pytest.mark.parametrize("width", [80, 57, 56])
def test_a_choice_wraps_between_words_below_its_beginning(width: int) -> None:
    console = terminal(width)
    Screen(console).say_choice("attention kernel", REASON)
    first, *rest = lines_on(console)[:-1]
    indent = 23 if width >= 57 else 4
    assert first.startswith("attention kernel       blocked, faster than")
    assert all(line.startswith(" " * indent) and line[indent] != " " for line in rest)
    assert " ".join([first, *rest]).split() == ["attention", "kernel", *REASON.split()]


def test_commands_and_tables_of_a_summary_stay_whole() -> None:
    console = terminal(40)
    Screen(console).say_summary(
        "done: 210 of 210 steps; the weights are in runs/quickstart\n  bin/smoltrain " + "x " * 30
    )
    assert lines_on(console)[:3] == [
        "done: 210 of 210 steps; the weights are", "in runs/quickstart", "  bin/smoltrain " + "x " * 30
    ]  # fmt: skip


def test_a_pipe_gets_whole_lines_without_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    file = io.StringIO()
    screen = Screen(open_console(file))
    screen.start_bar(0, 9)
    screen.show_step(1, "main", NUMBERS, 8.0)
    screen.say_choice("attention kernel", REASON)
    screen.say_validation(7, 5.2, 184.6, 2.8, math.inf)
    screen.say("WARNING: [bold]" + REASON)
    screen.close()
    assert file.getvalue().splitlines() == [
        f"attention kernel       {REASON}",
        "validation at step 7: loss 5.2000, perplexity 184.6, 2.800 bits per byte, the best so far",
        f"WARNING: [bold]{REASON}",
    ]


def test_a_pipe_that_wants_colours_gets_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    file = io.StringIO()
    screen = Screen(open_console(file))
    screen.start_bar(0, 9)
    screen.say("WARNING: " + REASON)
    screen.close()
    assert file.getvalue() == f"\x1b[33mWARNING: {REASON}\x1b[0m\n"


# ---- samples


def test_a_long_sample_is_cut_and_says_where_the_rest_is() -> None:
    text = "\n".join(f"line {i}" for i in range(13))
    shown = ["    line 0", "    line 1", "    line 2", "    line 3", "    ... 9 more lines in samples.jsonl"]
    assert cut_sample(text, None, "samples.jsonl") == shown
    assert cut_sample("\n".join(text.split("\n")[:4]), None, "samples.jsonl") == shown[:4]
    assert (
        cut_sample("\n".join(text.split("\n")[:5]), 80, "samples.jsonl")[-1] == "    ... 1 more line in samples.jsonl"
    )


def test_the_lines_of_a_sample_are_those_of_the_terminal() -> None:
    shown = cut_sample("word " * 100, 34, "samples.jsonl")
    assert shown == ["    " + "word " * 5 + "word"] * 4 + ["    ... 13 more lines in samples.jsonl"]


# ---- colour


def test_warnings_phases_and_the_best_loss_have_a_colour() -> None:
    console = terminal(80)
    screen = Screen(console)
    screen.say("WARNING: slow")
    screen.say_phase("phase main")
    screen.say_validation(7, 5.2, 184.6, 2.8, math.inf)
    screen.say_validation(8, 5.2, 184.6, 2.8, 5.2)
    screen.say("all else")
    warning, phase, best, worse, rest, _ = raw(console).split("\n")
    assert warning.startswith("\x1b[33m")
    assert phase.startswith("\x1b[1;36m")
    assert best.startswith("\x1b[32m")
    assert worse.startswith("validation at step 8")
    assert rest == "all else"


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colour_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    console = terminal(80)
    screen = Screen(console)
    screen.say("WARNING: slow")
    screen.say_validation(7, 5.2, 184.6, 2.8, math.inf)
    assert "\x1b[3" not in raw(console)
    screen.start_bar(0, 9)
    screen.close()
    assert "\x1b[3" not in raw(console)
    assert ("\x1b[?25h" in raw(console)) == (name == "NO_COLOR"), "a bar would be unreadable on a dumb terminal"


def test_texts_command_neither_the_terminal_nor_rich() -> None:
    console = terminal(80)
    screen = Screen(console)
    screen.say_sample(7, "[bold]a\x1b[2J\x1b]0;title\x07 :smile:", "samples.jsonl")
    screen.say("[red]a[/] path\x1b]0;title\x07 [/x]")
    assert raw(console).split("\n")[:3] == [
        "sample at step 7:",
        "    [bold]a\ufffd[2J\ufffd]0;title\ufffd :smile:",
        "[red]a[/] path\ufffd]0;title\ufffd [/x]",
    ]


# ---- the bar


def drawn_bars(console: Console) -> list[str]:
    """Every state of the bar."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", raw(console))
    return [part.strip() for part in re.split(r"\r\x1b\[2K|\n|\x1b\[\?25[lh]|\r", plain) if "left" in part]


def wait_for(condition: Callable[[], object]) -> None:
    """Until the thread that draws has drawn it."""
    limit = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_the_bar_shows_the_whole_command() -> None:
    console = terminal(120)
    screen = Screen(console)
    screen.start_bar(160, 210)
    assert re.fullmatch(r". [━╸╺]{24} starting    160/210  left \?", drawn_bars(console)[-1])
    screen.show_step(161, "main", MORE, 49.6)
    screen.say("a line above")
    after = r"main        161/210  loss 2.3457  12,346 tok/s  MFU 42.6%  left 0:50"
    wait_for(lambda: re.fullmatch(rf". [━╸╺]{{24}} {after}", drawn_bars(console)[-1]))
    with screen.show_activity("evaluating"):
        assert "evaluating  161/210" in drawn_bars(console)[-1]
    screen.say("another line")
    wait_for(lambda: "main        161/210" in drawn_bars(console)[-1])
    screen.close()
    assert raw(console).endswith("\x1b[?25h\r\x1b[1A\x1b[2K"), "the cursor is back, and the bar is gone"
    assert lines_on(console)[:2] == ["a line above", "another line"]


@pytest.mark.parametrize("width", [120, 80, 60, 40, 24, 10])
def test_the_bar_is_one_line_and_leaves_the_edge_free(width: int) -> None:
    console = terminal(width)
    screen = Screen(console)
    screen.start_bar(0, 123_456)
    screen.show_step(12_345, "a-long-name-of-a-phase", MORE, 1e6)
    screen.say("x")
    screen.close()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw(console))
    states = [part for part in re.split(r"[\r\n]", plain) if "123" in part]
    assert states
    assert max(map(cell_len, states)) <= width - 3
    assert "\x1b[1A" not in raw(console).split("\x1b[?25h")[0], "one line is overwritten, never two"


def test_the_bar_moves_while_nothing_happens() -> None:
    console = terminal(80)
    screen = Screen(console)
    screen.start_bar(0, 9)
    wait_for(lambda: len({bar[0] for bar in drawn_bars(console)}) >= 2)
    screen.close()


def test_a_terminal_without_the_letters_gets_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace")
    console = Console(file=file, width=80, force_terminal=True)
    screen = Screen(console)
    screen.start_bar(3, 9)
    screen.close()
    file.seek(0)
    assert "\\u" not in file.read()
    assert os.environ["TERM"] != "dumb"


def test_a_task_is_told_with_its_standard_errors() -> None:
    metrics = {"acc": 0.5, "acc_stderr": 0.0625, "word_perplexity": 12.0}
    assert (
        format_task_line(8, "sentences", metrics) == "sentences at step 8: acc 0.5000 ± 0.0625, word_perplexity 12.0000"
    )
