"""What is printed while data are prepared: how far it is, and what the readers have met."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.cells import cell_len

from smoltrain.data import progress
from smoltrain.data.documents.reader_health import ReaderHealth
from smoltrain.data.progress import report_progress
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokens import token_parts
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.terminal import show_activity
from tests.data.tokens.test_tokenise import given, twenty


def wait_for(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.002)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "POLL_INTERVAL_S", 0.001)


def test_a_line_now_and_then_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    calls: list[int] = []

    def state() -> tuple[str, float]:
        calls.append(1)
        return f"{len(calls)} tokens", 0.5

    monkeypatch.setattr(progress, "REPORT_INTERVAL_S", 0.0)
    with report_progress(state, ReaderHealth()):
        wait_for(lambda: len(calls) >= 2)
    assert capsys.readouterr().out.splitlines()[:2] == ["data: 1 tokens so far", "data: 2 tokens so far"]
    monkeypatch.setattr(progress, "REPORT_INTERVAL_S", 60.0)
    with report_progress(state, ReaderHealth()):
        time.sleep(0.05)
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_one_line_that_moves_in_the_place_of_another(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name, value in {"TTY_COMPATIBLE": "1", "TERM": "xterm", "COLUMNS": "60"}.items():
        monkeypatch.setenv(name, value)
    health = ReaderHealth()
    with show_activity("looking at data"):
        began = len(capsys.readouterr().out)
        with report_progress(lambda: ("12,345,678,901 tokens of 123,456 documents", 0.5), health):
            health.add_note("HTTP 503")
            wait_for(lambda: not health._notes)
            time.sleep(0.2)
        drawn = capsys.readouterr().out
    assert began
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn)
    states = [state for state in re.split(r"[\r\n]", plain) if "50%" in state]
    assert any("12,345" in state for state in states)
    assert max(map(cell_len, states)) <= 57
    assert "data: HTTP 503" in re.split(r"[\r\n]", plain)
    assert "looking" not in drawn[drawn.index("50%") : drawn.rindex("50%")]


def test_notes_are_printed_at_once_and_without_secrets(capsys: pytest.CaptureFixture[str]):
    health = ReaderHealth()
    with report_progress(None, health):
        health.add_note("https://user:secret@host/a.txt: HTTP 503")
        wait_for(lambda: not health._notes)
    assert capsys.readouterr().out == "data: https://REDACTED@host/a.txt: HTTP 503\n"


def test_an_error_within_the_block_ends_the_thread():
    health = ReaderHealth()
    with pytest.raises(ZeroDivisionError), report_progress(None, health):
        raise ZeroDivisionError
    health.add_note("late")
    time.sleep(0.02)
    assert health.take_notes() == ["late"]


def test_a_long_preparation_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    root = twenty(tmp_path)
    Tokenizer.train_bpe(["This is document"], 262, "<|endoftext|>").save(root / "given")
    prepared = prepare_run_data(given(root))
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(progress, "REPORT_INTERVAL_S", 0)
    tokenise = token_parts.TokeniseJob.tokenise_part

    def slow(work: token_parts.TokeniseJob, number: int) -> None:
        tokenise(work, number)
        time.sleep(0.5)

    monkeypatch.setattr(token_parts.TokeniseJob, "tokenise_part", slow)
    prepare_run_data(given(root, run__name="long"))
    *_, last = capsys.readouterr().out.splitlines()
    train, validation = len(prepared.train[0]), len(prepared.validation[0])
    assert last == f"data: {train:,} train tokens and {validation:,} validation tokens of 20 documents so far"
