"""A signal at the end of a phase, a terminal that closes, Ctrl-Z: whenever it comes, what was asked for happens."""

import os
import pty
import signal
import subprocess
import time
from pathlib import Path

import pytest

from smoltrain.errors import DONE, STOPPED
from tests import launches, tiny
from tests.zygote import zygote

LOSS = "validation/loss_nats_per_token"
# Due at the end of a phase alone; four steps of each.
SHORT = (
    "phases.main.steps=4", "evaluate.every=100", "sample.every=100", "checkpoint.every=100", "track.gradients_every=0",
    "sample.prompts=[one,two]",
)  # fmt: skip
LONG = (
    "phases.main.steps=5000", "evaluate.every=0", "sample.every=0", "track.gradients_every=0", "track.print_every=1",
)  # fmt: skip


# ---- at the end of a phase: ranks of launch/train.py, which train all phases in one process


def asked_in(place: str) -> None:
    """In a rank: the first time that it comes there, it gets a SIGTERM."""
    from smoltrain.checkpoint.saver import CheckpointSaver
    from smoltrain.run.track import Tracker
    from smoltrain.training import after_step, loop, sample

    owner, name = {
        "validation": (after_step, "evaluate_loss"),
        "sampling": (sample, "generate_ids"),
        "saving": (CheckpointSaver, "start_save"),
        "plotting": (loop, "draw_run"),
        "closing": (Tracker, "close"),
    }[place]
    whole, came = getattr(owner, name), []

    def interrupted(*args: object, **more: object) -> object:
        if not came:
            came.append(os.kill(os.getpid(), signal.SIGTERM))
        return whole(*args, **more)

    setattr(owner, name, interrupted)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("place", "end"),
    [
        *((place, "of a phase") for place in ("validation", "sampling", "saving")),
        *((place, "of the plan") for place in ("validation", "sampling", "saving", "plotting", "closing")),
    ],
)
def test_a_signal_at_the_end_is_not_swallowed(tmp_path: Path, place: str, end: str) -> None:
    words, run_folder = tiny.words(tmp_path, *SHORT), tmp_path / "runs" / "quickstart"
    until = [] if end == "of a phase" else ["run.stop_after=main"]
    life = zygote().train([*words, *until], 2, tmp_path / "log", asked_in, place)
    assert life.end() == [STOPPED] * 2, life.text()
    assert "; the same command goes on from there" in life.text()
    assert max(launches.losses(run_folder)) == 4, "no further phase has begun"
    measured = [line["step"] for line in launches.metrics(run_folder) if LOSS in line]
    assert measured == ([] if place == "validation" else [4])
    assert zygote().train([*words, "run.stop_after=main"], 2, tmp_path / "log").end() == [DONE] * 2
    assert [line["step"] for line in launches.metrics(run_folder) if LOSS in line] == [4], "made up for, once"
    assert zygote().train([*words, "run.stop_after=main"], 2, tmp_path / "again").end() == [DONE] * 2
    assert "phase main is complete" in (tmp_path / "again").read_text()
    assert "validation at" not in (tmp_path / "again").read_text()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_supervisor_makes_up_for_the_last_validation(tmp_path: Path) -> None:
    words, run_folder = tiny.words(tmp_path, *SHORT), tmp_path / "runs" / "quickstart"
    assert (
        zygote().train([*words, "run.stop_after=main"], 2, tmp_path / "log", asked_in, "validation").end() == [75] * 2
    )
    assert launches.run("smoltrain", [*words, "run.stop_after=main"], tmp_path / "made up") == DONE
    said = (tmp_path / "made up").read_text()
    loss = next(line[LOSS] for line in launches.metrics(run_folder) if LOSS in line)
    assert "phase main: its last validation, 2 new processes" in said
    assert "\ndone: 4 of 8 steps\n" in said
    assert f"  validation loss    {loss:.4f} nats per token at step 4" in said


# ---- a terminal


def on_terminal(launcher: str, words: list[str], *, nohup: bool) -> tuple[subprocess.Popen[bytes], int]:
    """The run as leader of a session with a terminal of its own, and the other end of that."""
    ours, theirs = pty.openpty()

    def adopt() -> None:
        os.close(os.open(os.ttyname(theirs), os.O_RDWR))  # the first one that a session's leader opens is its own
        signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)

    process = subprocess.Popen(
        [*launches.command(launcher), "quickstart", *words], stdin=theirs, stdout=theirs, stderr=theirs,
        env=launches.environment(), start_new_session=True, preexec_fn=adopt,  # noqa: PLW1509
    )  # fmt: skip
    os.close(theirs)
    return process, ours


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("launcher", "nohup"), [("smoltrain", False), ("smoltrain", True), ("python", False)])
def test_a_terminal_that_closes_stops_the_run_unless_nohup_says_otherwise(
    tmp_path: Path, launcher: str, nohup: bool
) -> None:
    steps = "phases.main.steps=20" if nohup else "phases.main.steps=5000"
    words, run_folder = tiny.words(tmp_path, *LONG, steps), tmp_path / "runs" / "quickstart"
    process, terminal = on_terminal(launcher, words, nohup=nohup)
    try:
        while not launches.losses(run_folder):
            os.read(terminal, 65536)
        os.close(terminal)
        assert process.wait(120) == (DONE if nohup else STOPPED)
        launches.wait_until_gone(words)
    finally:
        launches.kill_all(words)
    log = (run_folder / "logs" / "rank0.log").read_text()
    assert log.count("the console is dropped: stdout cannot be written to (Input/output error)") == 1 + nohup
    last = max(launches.losses(run_folder))
    assert (run_folder / "checkpoints" / f"step-{last:08d}").exists()
    assert last == 24 if nohup else f"stopped after step {last} (SIGHUP)" in log


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ctrl_z_stops_training_and_fg_goes_on(tmp_path: Path) -> None:
    words, run_folder = tiny.words(tmp_path, *LONG), tmp_path / "runs" / "quickstart"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*launches.command("smoltrain"), "quickstart", *words], stdout=log, stderr=log, env=launches.environment(),
            process_group=0,
        )  # fmt: skip
    try:
        launches.wait_for_step(run_folder, 3, process)
        process.send_signal(signal.SIGTSTP)
        time.sleep(1)
        reached = max(launches.losses(run_folder))
        time.sleep(2)
        assert max(launches.losses(run_folder)) == reached
        process.send_signal(signal.SIGCONT)
        launches.wait_for_step(run_folder, reached + 1, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == STOPPED
    finally:
        launches.kill_all(words)


# ---- a reader that goes away


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param("smoltrain", marks=pytest.mark.slow),
        *(pytest.param(name, marks=pytest.mark.long) for name in ("torchrun", "deepspeed", "python")),
    ],
)
def test_a_reader_that_goes_away_costs_no_step(tmp_path: Path, launcher: str) -> None:
    words, run_folder = tiny.words(tmp_path, *LONG, "phases.main.steps=40"), tmp_path / "runs" / "quickstart"
    with (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(
            [*launches.command(launcher), "quickstart", *words], stdout=subprocess.PIPE, stderr=err,
            env=launches.environment(), cwd=tmp_path,
        )  # fmt: skip
    try:
        assert process.stdout is not None
        while b"step  1/" not in process.stdout.readline():
            pass
        process.stdout.close()
        assert process.wait(120) == DONE, (tmp_path / "err").read_text()
    finally:
        launches.kill_all(words)
    assert sorted(launches.losses(run_folder)) == list(range(1, 45))
