"""`smoltrain watch` where it is printed once; a live one is in tests/whole_runs/test_monitor.py."""

import io
import os
import signal
import time
from pathlib import Path

import pytest
from rich.console import Console

from smoltrain.errors import UserError
from smoltrain.monitor import watch
from smoltrain.monitor.watch import WatchedRun, find_watched_folder, watch_run
from tests.monitor.records import make_run


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("once", [True, False])
def test_through_a_pipe_a_run_is_printed_once(tmp_path: Path, once: bool, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path)
    watch_run("quickstart", once=once)
    out = capsys.readouterr().out
    assert out.startswith("quickstart   failed   phase main   last line ")
    assert "loss 5.2000" in out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= watch.PIPE_CELLS


def test_once_needs_a_run(tmp_path: Path) -> None:
    make_run(tmp_path)
    with pytest.raises(UserError, match=r"no such run: saw 'mine', want .* a name under runs/ \(quickstart\)"):
        watch_run("mine")
    (tmp_path / "mine.yaml").write_text("")
    with pytest.raises(
        UserError, match=r"no such run: saw 'mine\.yaml', want a run: `smoltrain train mine.yaml` makes"
    ):
        watch_run("mine.yaml")


def test_a_run_is_found_by_name_and_by_folder(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert find_watched_folder("quickstart") == Path("runs/quickstart")
    assert find_watched_folder(str(run)) == run
    assert find_watched_folder("mine") is None


def test_a_terminal_gets_its_screen_back_where_the_view_is_ended_by_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = io.StringIO()
    terminal = Console(file=seen, width=80, height=24, force_terminal=True, _environ={"TERM": "xterm"})
    monkeypatch.setattr(watch, "open_console", lambda: terminal)
    looks: list[float] = []

    def ask_to_end(seconds: float) -> None:
        assert not looks, "nobody listens"
        looks.append(seconds)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(time, "sleep", ask_to_end)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # where nobody listens the test is not killed
    try:
        with pytest.raises(SystemExit) as left:
            watch_run("quickstart")
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    assert left.value.code == 143
    drawn, _, after = seen.getvalue().rpartition("\x1b[?1049l")
    assert "\x1b[?1049h" in drawn
    assert "\x1b[?25h" in drawn[-20:] + after, "the cursor is back"


def test_a_live_view_waits_for_its_run_and_ends_with_it(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=80, height=24)
    watched = WatchedRun("quickstart", console)
    console.print(watched.render())
    assert not watched.has_ended
    (tmp_path / "runs" / "quickstart" / "data").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / "data" / "index.json").touch()
    console.print(watched.render())
    assert not watched.has_ended, "its data are prepared, and somebody may start it"
    make_run(tmp_path)
    console.print(watched.render())
    assert watched.has_ended
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert shown.startswith("waiting for the run 'quickstart': there is none yet.")
    assert "quickstart   waiting" in shown
    assert "quickstart   failed" in shown
