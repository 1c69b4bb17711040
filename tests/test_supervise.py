"""`smoltrain train`, which is what ./train.sh runs: phases in fresh processes, kills, signals, exit codes."""

import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from smoltrain import checkpoint, supervise
from smoltrain.errors import BAD_INPUT, DONE, FAULT, INTERRUPTED, STOPPED
from tests import launches, tiny

LONG = (
    "phases.main.steps=60",
    "phases.main.warmup_steps=5",
    "checkpoint.every=10",
    "sample.every=0",
    "model.dropout=0.1",
)
END = 64


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run that nobody disturbed, and its transcript in ../../log."""
    folder = tmp_path_factory.mktemp("straight")
    assert launches.run("smoltrain", tiny.words(folder, *LONG), folder / "log") == DONE
    return folder / "runs" / "quickstart"


def transcript(run_folder: Path) -> str:
    return (run_folder.parent.parent / "log").read_text()


def test_each_phase_runs_in_fresh_processes_that_restore_from_disk(uninterrupted: Path) -> None:
    said = transcript(uninterrupted)
    assert "phase main: steps 1 to 60, 2 new processes" in said
    assert "phase continuation: steps 61 to 64, 2 new processes" in said
    assert "restored step 60 on 2 ranks" in said
    last = [m for m in launches.metrics(uninterrupted) if "validation/loss_nats_per_token" in m][-1]
    assert f"done: 64 of 64 steps, validation loss {last['validation/loss_nats_per_token']:.4f} nats per token" in said
    assert f"generate {uninterrupted} --prompt" in said
    assert {60, END} <= set(checkpoint.steps(uninterrupted / "checkpoints"))
    assert sorted(launches.losses(uninterrupted)) == list(range(1, END + 1))


def test_the_same_command_again_says_complete_in_one_line(uninterrupted: Path) -> None:
    folder = uninterrupted.parent.parent
    assert launches.run("smoltrain", tiny.words(folder, *LONG), folder / "again") == DONE
    said = (folder / "again").read_text().splitlines()
    assert len(said) == 1
    assert "the plan is complete at step 64" in said[0]


@pytest.mark.slow
def test_a_rank_killed_in_mid_run_costs_nothing_but_time(uninterrupted: Path, tmp_path: Path) -> None:
    words, run_folder = tiny.words(tmp_path, *LONG), tmp_path / "runs" / "quickstart"
    process = launches.start("smoltrain", words, tmp_path / "log")
    launches.wait_for_step(run_folder, 25, process)
    launches.ranks_alive(words)[1].kill()
    assert process.wait(launches.TIMEOUT_S) == FAULT
    launches.wait_until_gone(words)
    # Which of the two the launcher sees first is a matter of milliseconds: the killed one, or the one that lost it.
    assert re.search(r"error: a rank, or what started it, died \(exit code (247|1)\)", (tmp_path / "log").read_text())
    left = checkpoint.newest_valid(run_folder / "checkpoints", print)
    assert left is not None
    assert 20 <= left.step < 60
    assert launches.run("smoltrain", words, tmp_path / "log") == DONE
    assert f"restored step {left.step} on 2 ranks" in (tmp_path / "log").read_text()
    assert launches.losses(run_folder) == launches.losses(uninterrupted)
    assert launches.weights_digest(run_folder, END) == launches.weights_digest(uninterrupted, END)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_on_every_rank_and_the_rest_follows_bitwise(
    uninterrupted: Path, tmp_path: Path, number: signal.Signals
) -> None:
    words, run_folder = tiny.words(tmp_path, *LONG), tmp_path / "runs" / "quickstart"
    process = launches.start("smoltrain", words, tmp_path / "log")
    launches.wait_for_step(run_folder, 13, process)
    launches.interrupt(process, number)
    assert process.wait(40) == STOPPED
    launches.wait_until_gone(words)
    said = (tmp_path / "log").read_text()
    assert "the same command goes on from there" in said
    assert "Traceback" not in said
    assert "ERROR" not in said
    left = checkpoint.newest_valid(run_folder / "checkpoints", print)
    assert left is not None
    assert max(launches.losses(run_folder)) == left.step, "nothing that was computed is lost"
    assert launches.run("smoltrain", words, tmp_path / "log") == DONE
    assert launches.losses(run_folder) == launches.losses(uninterrupted)
    assert launches.weights_digest(run_folder, END) == launches.weights_digest(uninterrupted, END)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_first_step_ends_all_at_once(tmp_path: Path, number: signal.Signals) -> None:
    words = tiny.words(tmp_path, *LONG)
    process = launches.start("smoltrain", words, tmp_path / "log")
    while not launches.ranks_alive(words):
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    launches.interrupt(process, number)
    assert process.wait(40) == STOPPED
    launches.wait_until_gone(words)
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_the_second_ctrl_c_leaves_at_once_and_the_last_checkpoint_is_whole(tmp_path: Path) -> None:
    words, run_folder = tiny.words(tmp_path, "phases.main.steps=5000", "checkpoint.every=4"), tmp_path / "runs"
    process = launches.start("smoltrain", words, tmp_path / "log")
    launches.wait_for_step(run_folder / "quickstart", 6, process)
    for rank in launches.ranks_alive(words):
        rank.suspend()  # nothing could be saved now
    launches.interrupt(process, signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    launches.interrupt(process, signal.SIGINT)
    assert process.wait(10) == INTERRUPTED
    launches.wait_until_gone(words, 5)
    left = checkpoint.newest_valid(run_folder / "quickstart" / "checkpoints", print)
    assert left is not None
    assert left.step % 4 == 0


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGUSR1))]
)
def test_a_signal_while_there_are_no_ranks_yet_ends_the_command(tmp_path: Path, number: signal.Signals) -> None:
    lines = "\n".join(f"{i} what news from Naples" for i in range(400_000))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "long.txt").write_text(lines)
    words = tiny.words(tmp_path, *LONG)
    process = launches.start("smoltrain", words, tmp_path / "log")
    while not (tmp_path / "runs").exists():  # until then it imports
        assert process.poll() is None
        time.sleep(0.01)
    launches.interrupt(process, number)
    assert process.wait(20) == STOPPED
    said = (tmp_path / "log").read_text()
    assert said.splitlines()[-1] == "stopped before the first step; nothing was lost"
    assert "Traceback" not in said
    assert "new processes" not in said


@pytest.mark.parametrize(
    ("code", "done", "asked", "lost", "truth"),
    [
        (DONE, True, False, False, DONE),
        (DONE, True, True, False, DONE),  # too late to stop
        (DONE, False, True, False, STOPPED),  # DeepSpeed's runner, whose launcher was killed; the ranks saved
        (DONE, False, False, False, STOPPED),  # killed before a rank could notice
        (DONE, False, True, True, FAULT),  # and did not
        (DONE, False, False, True, FAULT),
        (STOPPED, False, True, False, STOPPED),
        (BAD_INPUT, False, False, False, BAD_INPUT),
        (FAULT, False, False, False, FAULT),  # a loss that is no number, just after a save
        (FAULT, False, True, False, STOPPED),  # DeepSpeed's launcher was signalled
        (FAULT, False, True, True, FAULT),  # and then a disk was full
        (-signal.SIGTERM, False, False, False, STOPPED),  # the runner was signalled
        (256 - signal.SIGUSR1, False, False, False, STOPPED),  # a rank, before its first step
        (256 - signal.SIGTERM, False, False, True, FAULT),
        (256 - signal.SIGKILL, False, True, False, FAULT),  # out of memory; the launcher then asked the others
        (256 - signal.SIGSEGV, False, False, False, FAULT),
    ],
)
def test_the_exit_code_is_true_whatever_the_launcher_says(
    code: int, done: bool, asked: bool, lost: bool, truth: int
) -> None:
    assert supervise._verdict(code, done, asked, lost) == truth


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["modell.hidden_size=3"], "unknown key modell"),
        (["data.path=nowhere.txt"], "the data are missing"),
        (["model.vocab_size=300"], "model.vocab_size"),
        (["batch.micro_batch=999"], "rows"),
        (["engine.ds_config=zero9"], "no such DeepSpeed config: saw 'zero9'"),
        (["batch.accumulation=null", "batch.rows_per_step=10"], "10 rows per step do not divide evenly: saw 2 ranks"),
        (["--ranks", "0"], "this machine cannot run so many ranks: saw 0, want 1 or more; change --ranks"),
    ],
)
def test_a_mistake_is_one_line_and_starts_no_process(tmp_path: Path, change: list[str], message: str) -> None:
    words = tiny.words(tmp_path, *change)
    assert launches.run("smoltrain", words, tmp_path / "log") == BAD_INPUT
    said = (tmp_path / "log").read_text()
    assert message in said
    assert "Traceback" not in said
    assert "new processes" not in said
    assert not (tmp_path / "runs" / "quickstart" / "checkpoints").exists()


def test_a_finished_run_of_another_model_is_not_called_complete(uninterrupted: Path) -> None:
    folder = uninterrupted.parent.parent
    words = tiny.words(folder, *LONG, "model.intermediate_size=96")
    assert launches.run("smoltrain", words, folder / "finished") == BAD_INPUT
    assert "model.intermediate_size differs" in (folder / "finished").read_text()


def test_a_run_that_belongs_to_another_model_is_left_as_it_is(uninterrupted: Path) -> None:
    folder = uninterrupted.parent.parent
    before = (uninterrupted / "config.yaml").read_bytes()
    words = tiny.words(folder, *LONG, "phases.continuation.steps=9", "model.intermediate_size=96", "run.seed=5")
    assert launches.run("smoltrain", words, folder / "other") == BAD_INPUT
    said = (folder / "other").read_text()
    assert "model.intermediate_size differs from the run's own: saw 96, want 64" in said
    assert "run.seed differs from the run's own: saw 5, want 1234" in said
    assert (uninterrupted / "config.yaml").read_bytes() == before
