"""The lines of the live view: they fit, and what matters most is on the smallest terminal."""

from pathlib import Path

import pytest
from rich.cells import cell_len

from smoltrain.monitor.run_reader import RunReader
from smoltrain.monitor.watch_view import NUMBERS, draw_view, draw_waiting, flow_words
from smoltrain.run.run_ending import write_ending
from tests.monitor.records import BEGAN_AT, make_run, write_lines

NOW_S = BEGAN_AT + 10 + 16 + 30


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> RunReader:
    """A run that stopped after 8 of 12 steps, with a warning and a sample that no terminal should obey."""
    run = make_run(tmp_path_factory.mktemp("watched"))
    write_ending(run, "stopped", "after step 8 (SIGTERM)")
    log = "2026-11-30 12:00:00,000 smoltrain INFO WARNING: 12% of the step is spent waiting for data\n"
    (run / "logs" / "rank0.log").write_text(log, encoding="utf-8")
    write_lines(run / "samples.jsonl", [{"step": 8, "prompt": "To \x1b[2J", "text": "be\n" * 9}])
    reader = RunReader(run)
    reader.refresh(NOW_S)
    return reader


def view(reader: RunReader, width: int, height: int, *, braille: bool = True) -> list[str]:
    return [line.plain for line in draw_view(reader, NOW_S, width, height, braille=braille)]


def test_all_that_is_known_is_shown(reader: RunReader) -> None:
    lines = view(reader, 80, 40)
    assert lines[0] == "quickstart   stopped   phase main   last line 30 s ago"
    assert lines[1] == "after step 8 (SIGTERM)"
    assert lines[2].endswith("─  8/12  66.7%")
    assert (lines[2].count("━"), lines[2].count("─")) == (27, 13), "two thirds of 40"
    shown = "\n".join(lines)
    for words in (
        "loss 5.2000   validation 5.5000   best 5.5000   lr 1.00e-03", "grad norm 1.500", "32 tokens/s", "MFU 25.0%",
        "memory 0.50 GiB", "tokens 512", "loss, nats per token: training, validation ●", "   5.9 │", "   5.2 │",
        "step 1 ", "WARNING: 12% of the step is spent waiting for data", "sample at step 8:\n    To �[2Jbe\n    be",
        "more lines in samples.jsonl",
    ):  # fmt: skip
        assert words in shown, words
    assert shown.count("●") == 3, "the heading's and two validations"
    assert "skipped" not in shown, "there were none"
    assert "\x1b" not in shown


@pytest.mark.parametrize("width", [10, 24, 40, 80, 140])
@pytest.mark.parametrize("height", [3, 10, 24, 50])
@pytest.mark.parametrize("braille", [True, False])
def test_the_view_fits_the_terminal(reader: RunReader, width: int, height: int, braille: bool) -> None:
    lines = view(reader, width, height, braille=braille)
    assert len(lines) <= height
    assert max(cell_len(line) for line in lines) <= width
    assert lines[0].startswith("quickstart"[: width - 1])
    if not braille:
        assert all(line.isascii() or "…" in line or "�" in line for line in lines)


def test_on_a_low_terminal_the_curve_outlives_the_sample(reader: RunReader) -> None:
    low = "\n".join(view(reader, 80, 13))
    assert "loss, nats per token" in low
    assert "sample at" not in low
    assert "WARNING" in low


def test_what_went_wrong_with_a_look_is_shown(reader: RunReader) -> None:
    lines = draw_view(reader, NOW_S, 80, 24, braille=True, trouble="Stale file handle")
    assert "Stale file handle" in [line.plain for line in lines]


def test_a_run_that_is_waited_for_says_what_there_is(reader: RunReader) -> None:
    (line,) = draw_waiting("mine", "a name under runs/ (other)", 200)
    expected = "waiting for the run 'mine': there is none yet. It may be a name under runs/ (other). Ctrl-C leaves."
    assert line.plain == expected


def test_words_flow_without_being_broken() -> None:
    assert flow_words(["aa", "bbb", "c"], 8) == ["aa   bbb", "c"]
    assert flow_words(["a" * 9], 8) == ["a" * 8]
    assert flow_words([], 8) == []


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (140, 40)])
def test_the_captures_of_the_docs_are_of_this_view(columns: int, lines: int) -> None:
    capture = (Path(__file__).parents[2] / "docs" / "results" / f"watching-{columns}x{lines}.txt").read_text("utf-8")
    shown = capture.splitlines()
    assert len(shown) <= lines
    assert max(cell_len(line) for line in shown) <= columns
    labels = [label for name, label, _ in NUMBERS if name != "train/skipped_updates"]  # there were none
    for words in ("one   running   phase main", "left ", "tokens/s", "training, validation ●", "sample at", *labels):
        assert words in capture, words
