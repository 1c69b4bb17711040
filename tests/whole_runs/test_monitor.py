"""Real runs as `smoltrain runs`, `watch` and `compare` see them: starting, running, killed, stopped, failed, done."""

import json
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from smoltrain.errors import DONE, FAULT, INTERRUPTED, STOPPED
from smoltrain.monitor.run_state import KILLED
from smoltrain.monitor.run_status import list_run_folders, read_run_status
from tests import launches, preloaded, tiny
from tests.terminals import TerminalSession

LONG = ("phases.main.steps=4000", "checkpoint.every=0", "evaluate.every=20", "sample.every=20", "track.print_every=100")
COMMAND = str(launches.BIN / "smoltrain")


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """One of the verbs, through a pipe."""
    line = [preloaded.programs() / "smoltrain", *words]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)


def runs_by_name(folder: Path) -> dict[str, dict[str, Any]]:
    return {status["name"]: status for status in json.loads(command(folder, "runs", "--json").stdout)}


@pytest.mark.slow
def test_a_run_is_seen_from_its_beginning_to_its_ends(tmp_path: Path) -> None:
    words = tiny.words(tmp_path, *LONG, "run.name=live")
    run = tmp_path / "runs" / "live"

    # ---- watched before it is there, on a terminal of 80 columns
    watch = TerminalSession([COMMAND, "watch", "live"], tmp_path, 80, 24, OMP_NUM_THREADS="1")
    watch.read_until(lambda raw: "waiting for the run 'live'" in raw)
    process = launches.start("smoltrain", words, tmp_path / "log.txt")
    try:
        launches.wait_until(lambda: bool(list_run_folders(run.parent)), 120)
        assert read_run_status(run).state == "waiting", "it has a lock, and no config.yaml yet"
        launches.wait_for_step(run, 6, process)
        assert read_run_status(run).state == "running"
        watch.read_until(lambda raw: "running" in raw and "sample at step" in raw)

        # ---- kill -9 of all: it does not count as running, and the view of it ends
        launches.kill_all(words)
        process.wait(60)
        assert watch.finish() == DONE
        killed = read_run_status(run)
        assert (killed.state, killed.note, killed.last_step) == ("failed", KILLED, 4004)
        assert killed.step >= 6
        assert killed.validation_step is not None
        assert killed.step - killed.validation_step <= 20
        for lines in watch.pictures:
            assert max(map(cell_len, lines)) <= 80
        left_behind = watch.raw.rpartition("\x1b[?1049l")[2]
        assert "failed   phase main   last line" in re.sub(r"\x1b\[[0-9;]*m", "", left_behind), "it stays on the screen"
        assert watch.raw.rindex("\x1b[?25h") > watch.raw.rindex("\x1b[?25l"), "the cursor is back"

        # ---- gone on with, watched until Ctrl-C, then stopped in good order
        process = launches.start("smoltrain", words, tmp_path / "log.txt")
        launches.wait_until(lambda: read_run_status(run).state == "running", 120)
        watch = TerminalSession([COMMAND, "watch", "live"], tmp_path, 140, 40, OMP_NUM_THREADS="1")
        watch.read_until(lambda raw: "tokens/s" in raw)
        watch.press(b"\x03")
        assert watch.finish() == INTERRUPTED
        assert "Traceback" not in watch.raw
        launches.interrupt(process, signal.SIGTERM)
        assert process.wait(60) == STOPPED
        stopped = read_run_status(run)
        assert (stopped.state, stopped.note) == ("stopped", f"after step {stopped.step} (SIGTERM)")
    finally:
        launches.kill_all(words)
        process.wait(60)
        watch.process.kill()
        watch.process.wait(60)


@pytest.mark.slow
def test_a_run_that_is_done_and_one_that_failed_by_itself_are_compared(tmp_path: Path) -> None:
    assert tiny.train(tmp_path, "run.name=well").returncode == DONE
    bad = tiny.train(tmp_path, "run.name=badly", "phases.main.lr=1e30", "phases.main.warmup_steps=0")
    assert bad.returncode == FAULT, bad.stderr
    well, badly = (runs_by_name(tmp_path)[name] for name in ("well", "badly"))
    assert (well["state"], well["step"], well["note"]) == ("done", 12, "")
    assert (badly["state"], badly["last_step"]) == ("failed", 12)
    assert badly["note"].startswith("TrainingStopped: step ")
    compared = command(tmp_path, "compare", "well", "badly", "--png", "c.png", "--html", "c.html")
    assert (compared.returncode, compared.stderr) == (DONE, "")
    lines = [" ".join(line.split()) for line in compared.stdout.splitlines()]
    assert lines[:2] == ["well badly", "state done failed"]
    assert "phases.main.lr 0.003 1e+30" in lines
    assert any(line.startswith("the same ") and "rows" in line for line in lines)
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert "<td>phases.main.lr</td>" in (tmp_path / "c.html").read_text(encoding="utf-8")
