"""`smoltrain train`, which is what ./train.sh runs: phases in fresh processes, kills, signals, exit codes."""

import io
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from smoltrain.checkpoint.manifest import find_newest_valid_checkpoint, list_checkpoint_steps
from smoltrain.config.load import list_recipes
from smoltrain.engine.deepspeed_json import fill_deepspeed_config, zero_stage
from smoltrain.errors import BAD_INPUT, DONE, FAULT, INTERRUPTED, STOPPED, UserError
from smoltrain.launch import supervisor
from smoltrain.launch.config_pipe import pack_start, unpack_start
from smoltrain.launch.signal_forwarder import SignalForwarder
from smoltrain.run.run_lock import lock_run_folder
from smoltrain.schedule import Plan
from smoltrain.training.start import Start
from tests import launches, tiny

LONG = (
    "phases.main.steps=60",
    "phases.main.warmup_steps=5",
    "checkpoint.every=10",
    "evaluate.every=32",
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
    for what in ("device", "precision", "attention kernel", "W&B", "plan"):
        assert [line[:22].strip() for line in said.splitlines()].count(what) == 1, "two phases, one command"
    assert "\x1b" not in said
    assert "\r" not in said
    last = [m for m in launches.metrics(uninterrupted) if "validation/loss_nats_per_token" in m][-1]
    assert "\ndone: 64 of 64 steps\n" in said
    assert f"  validation loss    {last['validation/loss_nats_per_token']:.4f} nats per token at step 64" in said
    assert " in 2 starts\n" in said, "one of each phase"
    assert said.count("measured on this machine: speed/mfu") == 1, "once a command"
    peaks = {line for line in said.splitlines() if "speed/mfu" in line}
    assert len(peaks) == 1, "measured once, for both phases"
    assert f"generate {uninterrupted} --prompt" in said
    assert {60, END} <= set(list_checkpoint_steps(uninterrupted / "checkpoints"))
    assert sorted(launches.losses(uninterrupted)) == list(range(1, END + 1))


def test_the_same_command_again_says_complete_in_one_line(uninterrupted: Path) -> None:
    folder = uninterrupted.parent.parent
    assert launches.run("smoltrain", tiny.words(folder, *LONG), folder / "again") == DONE
    said = (folder / "again").read_text().splitlines()
    assert len(said) == 1
    assert said[0].endswith("quickstart: the plan is complete (64 steps); nothing to do")


def test_what_run_stop_after_leaves_to_do_is_not_called_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tiny.words(tmp_path, "run.stop_after=main")
    done = SimpleNamespace(has_work=False, plan=Plan(tiny.load(tmp_path).phases), point=SimpleNamespace(step=8))
    monkeypatch.setattr(supervisor, "begin_run", lambda *_, **__: done)
    assert supervisor.supervise_run("quickstart", words) == DONE
    assert capsys.readouterr().out == "quickstart: phase main is complete (step 8 of 12); nothing to do\n"


@pytest.mark.slow
def test_a_rank_killed_in_mid_run_costs_nothing_but_time(uninterrupted: Path, tmp_path: Path) -> None:
    words, run_folder = tiny.words(tmp_path, *LONG), tmp_path / "runs" / "quickstart"
    process = launches.start("smoltrain", words, tmp_path / "log")
    launches.wait_for_step(run_folder, 25, process)
    next(rank for rank in launches.ranks_alive(words) if rank.environ()["RANK"] == "1").kill()
    assert process.wait(launches.TIMEOUT_S) == FAULT
    launches.wait_until_gone(words)
    said = (tmp_path / "log").read_text()
    assert "error: rank 1 was ended by SIGKILL; the same command goes on from the last checkpoint" in said
    left = find_newest_valid_checkpoint(run_folder / "checkpoints", print)
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
    left = find_newest_valid_checkpoint(run_folder / "checkpoints", print)
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
def test_ranks_whose_supervisor_was_killed_save_and_leave(tmp_path: Path) -> None:
    words, run_folder = tiny.words(tmp_path, *LONG, "checkpoint.every=0"), tmp_path / "runs" / "quickstart"
    process = launches.start("smoltrain", words, tmp_path / "log")
    launches.wait_for_step(run_folder, 5, process)
    process.kill()
    process.wait()
    launches.wait_until_gone(words)
    left = find_newest_valid_checkpoint(run_folder / "checkpoints", print)
    assert left is not None
    assert left.step == max(launches.losses(run_folder))
    assert f"stopped after step {left.step} (its launcher is gone)" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_the_second_ctrl_c_leaves_at_once_and_the_last_checkpoint_is_whole(tmp_path: Path) -> None:
    words, run_folder = tiny.words(tmp_path, "phases.main.steps=5000", "checkpoint.every=4"), tmp_path / "runs"
    process = launches.start("smoltrain", words, tmp_path / "log")
    launches.wait_for_step(run_folder / "quickstart", 6, process)
    while not list_checkpoint_steps(run_folder / "quickstart" / "checkpoints"):  # it is written beside training
        assert process.poll() is None
    for rank in launches.ranks_alive(words):
        rank.suspend()  # nothing could be saved now
    launches.interrupt(process, signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    launches.interrupt(process, signal.SIGINT)
    assert process.wait(10) == INTERRUPTED
    launches.wait_until_gone(words, 5)
    left = find_newest_valid_checkpoint(run_folder / "quickstart" / "checkpoints", print)
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


# ---- between phases


class Phase:
    """Stands in for the ranks of a phase, which are always done at once; `during` is what happens meanwhile."""

    launched: list[Start]
    during: Callable[[SignalForwarder], None]

    def __init__(self, words: list[str], count: int, device: str, start: Start, lock: int) -> None:
        self.launched.append(start)

    def run(self, signals: SignalForwarder) -> None:
        signals.ranks_were_started = True
        Phase.during(signals)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Start]:
    """The starts of the phases that were launched."""
    monkeypatch.setattr(supervisor, "RankProcesses", Phase)
    Phase.launched = []
    return Phase.launched


def ask_late(signals: SignalForwarder) -> None:
    """A signal that the ranks were told of when they had left their last step behind."""
    signals.pending = []
    os.kill(os.getpid(), signal.SIGTERM)
    signals.pending = None


def ask_after(signals: SignalForwarder) -> None:
    """A signal while there are no ranks."""
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("ask", [ask_late, ask_after])
def test_no_phase_begins_after_a_signal(
    launched: list[Start], tmp_path: Path, capsys: pytest.CaptureFixture[str], ask: Callable[..., None]
) -> None:
    Phase.during = ask
    assert supervisor.supervise_run("quickstart", tiny.words(tmp_path)) == STOPPED
    assert [start.config.run.stop_after for start in launched] == ["main"]
    assert capsys.readouterr().out.splitlines()[-1].endswith("; the same command goes on from there")


def test_all_phases_train_what_the_recipe_said_at_the_start(launched: list[Start], tmp_path: Path) -> None:
    recipe, engine = tmp_path / "my.yaml", tmp_path / "mine.json"
    recipe.write_text(list_recipes()["quickstart"].read_text(encoding="utf-8"), encoding="utf-8")
    engine.write_text('{"zero_optimization": {"stage": 1}}', encoding="utf-8")

    def edit(_signals: SignalForwarder) -> None:
        recipe.write_text(recipe.read_text(encoding="utf-8").replace("lr: 8.0e-4", "lr: 9.9e-3") + "x: 1", "utf-8")
        engine.write_text("{", encoding="utf-8")

    Phase.during = edit
    words = [word for word in tiny.words(tmp_path) if not word.startswith("phases.continuation.lr=")]
    assert supervisor.supervise_run(str(recipe), [*words, f"engine.ds_config={engine}"]) == DONE
    handed = [unpack_start(io.BytesIO(pack_start(start))).config for start in launched]
    assert [(at.run.stop_after, at.phases[1].lr) for at in handed] == [("main", 8e-4), ("continuation", 8e-4)]
    assert zero_stage(fill_deepspeed_config(handed[1], precision="fp32", accumulation=2, world_size=2)) == 1


@pytest.mark.slow
def test_a_run_is_locked_until_its_supervisor_and_its_ranks_have_left(tmp_path: Path) -> None:
    """A supervisor that is killed leaves ranks behind that save: nobody else may write into the run meanwhile."""
    words, run_folder = tiny.words(tmp_path, *LONG, "checkpoint.every=0"), tmp_path / "runs" / "quickstart"
    process = launches.start("smoltrain", words, tmp_path / "log")
    launches.wait_for_step(run_folder, 3, process)
    settings = tiny.load(tmp_path, *LONG)
    with pytest.raises(UserError, match="another process trains this run"):
        lock_run_folder(settings, patience_s=0.0)
    for rank in launches.ranks_alive(words):
        rank.suspend()
    process.kill()
    process.wait()
    try:
        with pytest.raises(UserError, match="another process trains this run"):
            lock_run_folder(settings, patience_s=0.5)
        for rank in launches.ranks_alive(words):
            rank.resume()
        lock = lock_run_folder(settings)
        assert lock is not None
        assert not launches.ranks_alive(words)
        os.close(lock)
    finally:
        launches.kill_all(words)


def test_a_later_phase_says_what_is_new_in_it(tmp_path: Path) -> None:
    changed = ("phases.continuation.optimizer_state=reset", "phases.continuation.weight_decay=0.1")
    plan = Plan(tiny.load(tmp_path, *changed).phases)
    assert supervisor.describe_phase_changes(plan, plan.phases[0]) == ""
    assert supervisor.describe_phase_changes(plan, plan.phases[1]) == (
        "schedule cosine -> linear, lr 0.003 -> 0.0003, the optimizer's state begins at zero"
    )
    continues = ("phases.continuation.schedule=continue", "phases.continuation.lr=null")
    plan = Plan(tiny.load(tmp_path, *continues, "phases.main.warmup_steps=0", "phases.main.schedule=linear").phases)
    assert supervisor.describe_phase_changes(plan, plan.phases[1]) == (
        "schedule linear -> continue, lr 0.0008125 to its end, weight_decay 0.1 -> 0.02"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["modell.hidden_size=3"], "unknown key modell"),
        (["data.path=nowhere.txt"], "the data are missing"),
        (["batch.micro_batch=999"], "rows"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (["model.vocab_size=300"], "model.vocab_size"),
                (["engine.ds_config=zero9"], "no such DeepSpeed config: saw 'zero9'"),
                (
                    ["batch.accumulation=null", "batch.rows_per_step=9"],
                    "9 rows per step do not divide evenly: saw 2 ranks",
                ),
                (["--ranks", "0"], "this machine cannot run so many ranks: saw 0, want 1 or more; change --ranks"),
            )
        ),
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
    assert "model.intermediate_size: 64 in the run, 96 asked" in (folder / "finished").read_text()


def test_a_run_that_belongs_to_another_model_is_left_as_it_is(uninterrupted: Path) -> None:
    folder = uninterrupted.parent.parent
    before = (uninterrupted / "config.yaml").read_bytes()
    words = tiny.words(folder, *LONG, "phases.continuation.steps=9", "model.intermediate_size=96", "run.seed=5")
    assert launches.run("smoltrain", words, folder / "other") == BAD_INPUT
    said = (folder / "other").read_text()
    assert "model.intermediate_size: 64 in the run, 96 asked" in said
    assert "run.seed: 1234 in the run, 5 asked" in said
    assert (uninterrupted / "config.yaml").read_bytes() == before
