"""Lines that fit, and the one line that moves: which of several is shown, and what others leave of it."""

import contextlib
import io
import re
import sys

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from smoltrain.terminal import (
    Column,
    LiveLine,
    can_draw,
    clear_live_line,
    fit_columns,
    hide_live_line,
    interrupt_live_line,
    is_terminal,
    open_console,
    print_text,
    show_activity,
    show_control_characters,
    wrap_words,
)


@pytest.fixture(autouse=True)
def _usual_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.mark.parametrize(
    ("environment", "obeys", "draws"),
    [
        ({}, False, False),
        ({"TTY_COMPATIBLE": "1"}, True, True),
        ({"TTY_COMPATIBLE": "1", "TERM": "dumb"}, True, False),
        ({"TTY_COMPATIBLE": "1", "NO_COLOR": "1"}, True, True),
        ({"TTY_COMPATIBLE": "1", "FORCE_COLOR": "1"}, True, True),
        ({"FORCE_COLOR": "1"}, False, False),
    ],
)
def test_nothing_moves_through_a_pipe(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], obeys: bool, draws: bool
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    console = open_console(io.StringIO())
    assert (is_terminal(console), can_draw(console)) == (obeys, draws)


def test_columns_are_left_out_by_rank_and_the_first_rank_never() -> None:
    columns = [Column("aa"), Column("bb", 2), Column("cc", 1), Column("dd", 3)]
    assert fit_columns(columns, None) == "aa  bb  cc  dd"
    assert [fit_columns(columns, width, "") for width in (8, 7, 5, 3, 1)] == ["aabbccdd", "aabbcc", "aacc", "aa", "aa"]
    assert fit_columns([Column("東京"), Column("x", 1)], 5) == "東京", "a wide character is two cells"


@pytest.mark.parametrize(
    ("text", "width", "indent", "lines"),
    [
        ("one two three", 80, 4, ["one two three"]),
        ("one two three", 7, 2, ["one two", "  three"]),
        ("label      one two three four", 18, 11, ["label      one two", " " * 11 + "three", " " * 11 + "four"]),
        ("first line\n  second line", 8, 0, ["first", "line", "  second", "line"]),
        ("a/path/that/is/long", 8, 2, ["a/path/t", "  hat/is", "  /long"]),
        ("東京 東京 東京", 9, 0, ["東京 東京", "東京"]),
        ("", 9, 0, [""]),
        ("[bold]x[/]", 80, 0, ["[bold]x[/]"]),
    ],
)
def test_words_are_wrapped_whole_below_their_beginning(text: str, width: int, indent: int, lines: list[str]) -> None:
    assert wrap_words(text, width, indent) == lines
    assert all(cell_len(line) <= width for line in lines)


def test_a_sentence_wraps_on_a_terminal_alone() -> None:
    text = "WARNING: " + "word " * 9 + "end"
    piped = io.StringIO()
    print_text(text, open_console(piped))
    assert piped.getvalue() == text + "\n"
    shown = io.StringIO()
    print_text(text, Console(file=shown, width=30, force_terminal=True))
    assert shown.getvalue().startswith("\x1b[33mWARNING: word word word word\x1b[0m\n")


# ---- the line that moves


def screen_of(output: str) -> list[str]:
    """The lines that stand there in the end."""
    return [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line.split("\r\x1b[2K")[-1]).strip() for line in output.split("\n")]


def terminal(monkeypatch: pytest.MonkeyPatch) -> Console:
    """Stdout, which from now on believes to be a terminal."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    return open_console()


def output(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_an_activity_is_shown_while_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    console = terminal(monkeypatch)
    with contextlib.suppress(ZeroDivisionError), show_activity("looking"):
        assert "looking ..." in output(console)
        print("a line of somebody who knows nothing of it")
        assert screen_of(output(console))[0] == "a line of somebody who knows nothing of it"
        raise ZeroDivisionError
    assert output(console).endswith("\x1b[?25h\r\x1b[1A\x1b[2K")


def test_the_innermost_activity_is_shown_then_the_outer_one_again(monkeypatch: pytest.MonkeyPatch) -> None:
    console = terminal(monkeypatch)
    with show_activity("outer"):
        with show_activity("inner"):
            began = len(output(console))
            assert "inner" in output(console)
            print("a line")
        assert "outer" not in output(console)[began:].split("a line")[0]
        assert "outer" in output(console)[began:].split("a line")[1]
        with hide_live_line():
            hidden = len(output(console))
            print("a line")
            assert output(console)[hidden:] == "a line\n"
        assert "outer" in output(console)[hidden:]


def test_lines_that_stop_out_of_order_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    console = terminal(monkeypatch)
    first, second = (LiveLine(console, lambda _, name=name: Text(name)) for name in ("first", "second"))
    first.start()
    second.start()
    first.stop()
    second.stop()
    stopped = len(output(console))
    print("a line")
    assert output(console)[stopped:] == "a line\n"
    assert output(console).count("\x1b[?25h") == 2


def test_another_process_writes_in_the_place_of_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    console = terminal(monkeypatch)
    line = LiveLine(console, lambda width: Text("x" * width))
    line.start()
    interrupt_live_line("stopping", open_console(console.file))  # pyright: ignore[reportArgumentType]
    line.refresh()
    line.stop()
    assert screen_of(output(console))[0] == "stopping"
    assert set(screen_of(output(console))[1]) == {"x"}, "it is drawn again, below"


def test_what_moves_leaves_room_for_the_echo_of_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    console = terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", "30")
    widths: list[int] = []

    def render(width: int) -> Text:
        widths.append(width)
        return Text("x")

    line = LiveLine(console, render)
    line.start()
    line.stop()
    assert set(widths) == {27}


def test_a_pipe_gets_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    with show_activity("looking"):
        interrupt_live_line("stopping", open_console())
        clear_live_line(open_console())
    assert capsys.readouterr().out == "stopping\n"


def test_what_a_model_writes_is_shown_on_a_terminal_and_left_as_it_is_in_a_pipe(monkeypatch: pytest.MonkeyPatch):
    text = "\x1b[31m\x9b\u202e a\tb\né👩\u200d🔬"
    pipe = io.StringIO()
    assert show_control_characters(text, pipe) == text
    monkeypatch.setattr(pipe, "isatty", lambda: True)
    assert show_control_characters(text, pipe) == "␛[31m\ufffd\ufffd a\tb\né👩\u200d🔬"
