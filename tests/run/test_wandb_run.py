"""W&B behind its guard: against a server of its protocol on the loopback, healthy and not, and against fakes."""

import contextlib
import gc
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from smoltrain.engine.layer_gradients import LayerGradient
from smoltrain.run import wandb_connection, wandb_uploads
from smoltrain.run.sink import HISTOGRAM_PREFIX
from smoltrain.run.track import Tracker
from smoltrain.timeout import call_with_timeout
from tests import launches, tiny, wandb_files
from tests.wandb_server import WandbServer

ID = "12345678"
PATIENCE_S = 2.0
FAULTS = ("error", "hang", "nonsense", "unauthorized")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny.forget_wandb(tmp_path, monkeypatch)
    return tmp_path


def end_of_process() -> None:
    """What wandb keeps between two runs of one process is gone, whatever state it is in."""
    import wandb

    with contextlib.suppress(Exception):
        call_with_timeout(wandb.teardown, 10)
    for process in psutil.Process().children():
        if "wandb-core" in process.name():
            process.kill()
            process.wait()
    gc.collect()


@pytest.fixture
def server(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    monkeypatch.setattr(subprocess.Popen, "__del__", lambda _: None)  # wandb does not wait for its own process
    end_of_process()  # of another test
    monkeypatch.setattr(wandb_connection, "FINISH_TIMEOUT_S", 3.0)
    with WandbServer() as opened:
        for name, value in opened.environment().items():
            monkeypatch.setenv(name, value)
        yield opened
        opened.fail("error")
        end_of_process()


def opened(folder: Path, *overrides: str, first_step: int = 0, name: str = "quickstart") -> Tracker:
    words = ("track.wandb=online", f"track.wandb_timeout_s={PATIENCE_S}", f"run.name={name}", *overrides)
    settings = tiny.load(folder, *words)
    settings.run_folder.mkdir(parents=True, exist_ok=True)
    return Tracker(settings, tiny.run_folder(settings.run_folder), 0, first_step, 12)


def trained(tracker: Tracker, first: int, last: int) -> None:
    for step in range(first, last + 1):
        tracker.log_metrics(step, {"train/lr": step / 10})


def rates(server: WandbServer, name: str = ID) -> dict[int, float]:
    """The learning rate at each step, as the server has it."""
    return {s: values["train/lr"] for s, values in sorted(server.runs[name].steps.items()) if "train/lr" in values}


def plan(first: int, last: int) -> dict[int, float]:
    return {step: step / 10 for step in range(first, last + 1)}


# ---- a server that works


def test_a_server_is_told_everything(server: WandbServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = opened(tmp_path, "track.wandb_model=end", "track.wandb_entity=team", "track.wandb_tags=[a,b]")
    trained(tracker, 1, 3)
    tracker.log_gradients(4, {"norm": LayerGradient(1.0, np.array([1]), np.array([0.0, 1.0]))})
    tracker.log_samples(4, [("a", "b")])
    folder = tmp_path / "runs" / "quickstart"
    (folder / "tokenizer").mkdir()
    for path in ("config.yaml", "weights"):
        (folder / path).write_text("x", encoding="utf-8")
    tracker.log_model(4, folder / "weights", ends_phase=True)
    tracker.log_model(12, folder / "weights", ends_phase=True)
    tracker.close(3)
    run = server.runs[ID]
    assert rates(server) == plan(1, 3)
    assert run.steps[4][HISTOGRAM_PREFIX + "norm"]["_type"] == "histogram"
    assert run.steps[4]["samples"]["nrows"] == 1
    assert [a["artifactTypeName"] for a in run.artifacts] == ["wandb-run-incremental-table", "model"], (
        "of the end alone"
    )
    assert run.config["model"]["hidden_size"] == 32
    assert run.exit_code == 3
    told = {key: run.fields[key] for key in ("project", "entity", "displayName", "tags")}
    assert told == {"project": "smoltrain", "entity": "team", "displayName": "quickstart", "tags": ["a", "b"]}
    assert "WARNING" not in capsys.readouterr().out


# ---- a server that fails


def fail(server: WandbServer, fault: str) -> None:
    match fault:
        case "closed":
            server.close()
        case "killed":
            for process in psutil.Process().children():
                if "wandb-core" in process.name():
                    process.kill()
        case _:
            server.fail(fault)  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
@pytest.mark.parametrize("fault", [*FAULTS, "closed", "killed"])
def test_a_server_that_fails_later_costs_no_run_and_lacks_nothing_in_the_end(
    server: WandbServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    tracker = opened(tmp_path, "track.wandb_model=checkpoint")
    folder = tmp_path / "runs" / "quickstart"
    (folder / "tokenizer").mkdir()
    for path in ("config.yaml", "weights"):
        (folder / path).write_text("x", encoding="utf-8")
    trained(tracker, 1, 4)
    server.wait_for_step(ID, 3)
    fail(server, fault)
    begin = time.monotonic()
    for step in range(5, 9):
        trained(tracker, step, step)
        tracker.log_samples(step, [("a", "b")])
        tracker.log_model(step, folder / "weights", ends_phase=False)
    assert time.monotonic() - begin < 2 * PATIENCE_S + 1
    begin = time.monotonic()
    tracker.close(0)
    assert time.monotonic() - begin < PATIENCE_S + 1
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    assert 1 <= len(warnings) <= 2
    assert all(line.startswith("WARNING: W&B ") for line in warnings)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 9))
    if fault != "closed":
        end_of_process()
        server.fail("")
        tracker = opened(tmp_path, first_step=8)
        trained(tracker, 9, 9)
        tracker.close(0)
        assert rates(server) == plan(1, 9)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_fails_at_the_start_leaves_the_run_offline(
    server: WandbServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    fail(server, fault)
    begin = time.monotonic()
    tracker = opened(tmp_path)
    trained(tracker, 1, 3)
    tracker.log_samples(3, [("a", "b")])
    tracker.close(0)
    assert time.monotonic() - begin < 20
    said = capsys.readouterr().out
    assert said.startswith("W&B                    offline, going online failed (")
    assert "WARNING" not in said
    (path,) = tmp_path.glob("runs/quickstart/wandb/offline-run-*/run-*.wandb")
    assert sorted(wandb_files.read_finished(path).steps) == [1, 2, 3]


@pytest.mark.slow
def test_a_training_ends_well_though_its_server_does_not(server: WandbServer, tmp_path: Path) -> None:
    server.fail("hang", after_step=2)
    output = tiny.train(
        tmp_path, "track.wandb=auto", f"track.wandb_timeout_s={PATIENCE_S}", "phases.main.steps=8",
        "run.stop_after=main", "sample.every=3", "track.wandb_model=phase", "checkpoint.background=false",
        **server.environment(),
    )  # fmt: skip
    assert output.returncode == 0, output.stdout + output.stderr
    assert "phase main is complete (step 8 of 12)" in output.stdout
    warnings = [line for line in output.stdout.splitlines() if line.startswith("WARNING: W&B ")]
    assert 1 <= len(warnings) <= 2, warnings
    assert "Traceback" not in output.stderr
    assert sorted(launches.losses(tmp_path / "runs" / "quickstart")) == list(range(1, 9))


@pytest.mark.slow
def test_a_server_has_every_step_of_a_run_that_was_killed(server: WandbServer, tmp_path: Path) -> None:
    words = (
        "track.wandb=auto", "phases.main.steps=150", "run.stop_after=main", "checkpoint.every=40",
        "sample.every=0", "evaluate.every=0", "track.gradients_every=0",
    )  # fmt: skip
    metrics = tmp_path / "runs" / "quickstart" / "metrics.jsonl"
    script = Path(__file__).parents[2] / "launch" / "train.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SMOLTRAIN_THREADS": "1"}
    command = [sys.executable, str(script), "quickstart", *tiny.words(tmp_path, *words)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as killed:
        while killed.poll() is None and not (metrics.exists() and '"step": 70' in metrics.read_text(encoding="utf-8")):
            time.sleep(0.01)
        family = psutil.Process(killed.pid).children(recursive=True)
        killed.kill()
        for process in family:  # W&B's own, with whatever it has not sent
            process.kill()
    output = tiny.train(tmp_path, *words, **server.environment())
    assert output.returncode == 0, output.stdout + output.stderr
    (run,) = server.runs.values()
    losses = {s: values["train/loss_nats_per_token"] for s, values in run.steps.items() if "train/lr" in values}
    assert losses == launches.losses(tmp_path / "runs" / "quickstart")
    assert sorted(losses) == list(range(1, 151))


class Broken:
    """A run of W&B whose every call raises, or does not come back."""

    starting_step = 0
    url = None

    def __init__(self, error: BaseException | None) -> None:
        self.summary: dict[str, Any] = {}
        self.calls: list[str] = []
        self._error = error
        self.settings = type("Settings", (), {"sync_dir": "wandb/run-1", "mode": "online", "log_internal": "none"})

    def _answer(self, name: str) -> None:
        self.calls.append(name)
        if self._error is None:
            time.sleep(60)
        else:
            raise self._error

    def log(self, values: dict[str, Any], step: int) -> None:
        if "samples" in values:
            self._answer("table")

    def log_artifact(self, *_: Any, **__: Any) -> None:
        self._answer("model")

    def define_metric(self, name: str, **_: Any) -> None:
        pass

    def write_logs(self, text: str) -> None:
        pass

    def finish(self, exit_code: int) -> None:
        self._answer(f"finish {exit_code}")


@pytest.mark.parametrize("error", [None, RuntimeError("out of order\nand more"), SystemExit(1)], ids=repr)
def test_each_fault_is_said_once_and_waited_for_once(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException | None
) -> None:
    import wandb

    run = Broken(error)
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    tracker = opened(home, "track.wandb_timeout_s=0.1")
    for step in range(1, 4):
        trained(tracker, step, step)
        tracker.log_samples(step, [("a", "b")])
    tracker.close(0)
    assert run.calls == ["table", "finish 0"]
    first, last = (line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING"))
    why = {RuntimeError: "out of order", SystemExit: "SystemExit(1)"}.get(type(error), "no answer within 0.1 s")
    assert first.startswith(f"WARNING: W&B did not accept the samples of step 1 ({why}): no more ")
    assert last.endswith("; `wandb sync wandb/run-1` uploads them")


def test_a_step_that_cannot_be_handed_over_ends_wandb_alone(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    run = Broken(None)
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    tracker = opened(home)
    trained(tracker, 1, 1)

    def lost(*_: Any, **__: Any) -> None:
        raise ConnectionResetError("Connection lost")

    monkeypatch.setattr(run, "log", lost)
    trained(tracker, 2, 4)
    tracker.log_samples(4, [("a", "b")])
    tracker.close(0)
    assert run.calls == [], "nothing is asked of it any more"
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING"))
    assert line.startswith("WARNING: W&B is dropped at step 2 (Connection lost); ")


# ---- what W&B lacks, and what it has of another past


def test_a_server_that_lacks_steps_is_given_them(server: WandbServer, tmp_path: Path) -> None:
    tracker = opened(tmp_path)
    trained(tracker, 1, 4)
    tracker.close(1)
    server.runs[ID].lines = dict(list(server.runs[ID].lines.items())[:2])  # as if W&B had been killed before it sent 3
    tracker = opened(tmp_path, first_step=4)
    trained(tracker, 5, 6)
    tracker.close(0)
    assert rates(server) == plan(1, 6)
    lines = (tmp_path / "runs" / "quickstart" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert server.runs[ID].steps[3]["_timestamp"] == json.loads(lines[2])["time_s"], "when it was trained"


def test_a_server_that_has_nothing_is_given_all(server: WandbServer, tmp_path: Path) -> None:
    for mode, first_step, last_step in (("offline", 0, 4), ("online", 4, 6)):  # nobody has called `wandb sync`
        tracker = opened(tmp_path, f"track.wandb={mode}", first_step=first_step)
        trained(tracker, first_step + 1, last_step)
        tracker.close(0)
    assert rates(server) == plan(1, 6)


def test_a_histogram_that_cannot_be_made_costs_no_run(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    monkeypatch.setattr(wandb, "init", lambda **_: Broken(None))
    tracker = opened(home, "track.wandb_timeout_s=0.1")
    for step in (1, 2):
        tracker.log_gradients(step, {"norm": LayerGradient(1.0, np.ones(600), np.arange(601.0))})  # wandb takes 512
    trained(tracker, 3, 3)
    tracker.close(0)
    first, _ = (line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING"))
    assert first.startswith("WARNING: W&B did not accept the histograms of step 1 (")


def test_going_back_on_purpose_is_a_new_run_with_the_old_past(
    server: WandbServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = opened(tmp_path)
    trained(tracker, 1, 12)
    tracker.close(0)
    tracker = opened(tmp_path, first_step=9)  # as after a kill: the same steps, the same values
    trained(tracker, 10, 12)
    tracker.close(0)
    assert (list(server.runs), len(server.runs[ID].history)) == ([ID], 12)
    capsys.readouterr()
    tracker = opened(tmp_path, "phases.continuation.lr=1e-5", first_step=9)
    for step in range(10, 13):
        tracker.log_metrics(step, {"train/lr": 7.0})
    tracker.close(0)
    said = capsys.readouterr().out
    assert f"; run id {ID}-2, a new id: steps 10 to 12 of {ID} are of another plan" in said
    assert "; steps 1 to 9, which it lacked, come from metrics.jsonl" in said
    assert rates(server) == plan(1, 12)
    assert rates(server, f"{ID}-2") == plan(1, 9) | dict.fromkeys(range(10, 13), 7.0)


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_step_that_comes_out_with_other_rows_is_of_a_new_run(
    server: WandbServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    def train(first: int, last: int, rows: str, first_step: int) -> None:
        tracker = opened(tmp_path, f"track.wandb={mode}", first_step=first_step)
        for step in range(first, last + 1):
            tracker.log_metrics(step, {"train/lr": 0.5, "data/ledger": f"{rows if step > 4 else 'a'}{step}"})
        tracker.close(0)

    train(1, 6, "a", 0)
    train(4, 6, "a", 3)  # a kill: nothing else happens
    assert f"{ID}-2" not in capsys.readouterr().out
    train(4, 8, "b", 3)  # a rewind that passes rows over
    lines = capsys.readouterr().out.splitlines()
    said = [line for line in lines if line.startswith("W&B   ")]
    assert len(said) == 2
    pages = [line.split()[-1] for line in lines if line.startswith("W&B page")]
    assert pages == ([f"{server.url}/me/smoltrain/runs/{name}" for name in (ID, f"{ID}-2")] if mode == "online" else [])
    assert f"run id {ID}-2, a new id: step 5 has come out with other rows than {ID} has of it" in said[1]
    assert "steps 1 to 4, which it lacked, come from metrics.jsonl" in said[1]
    train(8, 9, "b", 7)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("W&B")]
    assert len(lines) == (2 if mode == "online" else 1)
    if mode == "online":
        assert {name: list(rates(server, name)) for name in server.runs} == {
            ID: [1, 2, 3, 4, 5, 6], f"{ID}-2": [1, 2, 3, 4, 5, 6, 7, 8, 9],
        }  # fmt: skip


def test_offline_going_back_and_a_copy_have_files_of_their_own(home: Path) -> None:
    def told(name: str) -> dict[str, dict[int, float]]:
        files = [wandb_files.read_finished(p) for p in (home / "runs" / name).glob("wandb/offline-run-*/run-*.wandb")]
        found: dict[str, dict[int, float]] = {}
        for one in files:
            found.setdefault(one.run_id, {}).update({s: v["train/lr"] for s, v in one.steps.items()})
        return found

    tracker = opened(home, "track.wandb=offline")
    trained(tracker, 1, 10)
    tracker.close(0)
    shutil.copytree(home / "runs" / "quickstart", home / "runs" / "copy", ignore=shutil.ignore_patterns("wandb"))
    tracker = opened(home, "track.wandb=offline", "phases.continuation.lr=1e-5", first_step=8)
    tracker.log_metrics(9, {"train/lr": 7.0})
    tracker.close(0)
    assert told("quickstart") == {ID: plan(1, 10), f"{ID}-2": plan(1, 8) | {9: 7.0}}
    tracker = opened(home, "track.wandb=offline", name="copy", first_step=10)
    trained(tracker, 11, 12)
    tracker.close(0)
    (own,) = told("copy").items()
    assert own[0] != ID
    assert own[1] == plan(1, 12)


def test_steps_that_were_trained_while_wandb_was_off_are_given_to_it_later(home: Path) -> None:
    for mode, first_step, last_step in (("offline", 0, 3), ("off", 3, 5), ("offline", 5, 6)):
        tracker = opened(home, f"track.wandb={mode}", first_step=first_step)
        trained(tracker, first_step + 1, last_step)
        tracker.close(0)
    steps: list[int] = []
    for path in home.glob("runs/quickstart/wandb/offline-run-*/run-*.wandb"):
        steps += wandb_files.read_finished(path).steps
    assert sorted(steps) == [1, 2, 3, 4, 5, 6]


def test_the_code_is_an_artifact_where_the_recipe_asks(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = home / "package"
    package.mkdir()
    (package / "model.py").write_text("x = 1\n", encoding="utf-8")
    (package / "notes.txt").write_text("no code\n", encoding="utf-8")
    monkeypatch.setattr(wandb_uploads, "PACKAGE_FOLDER", package)
    found: list[list[str]] = []
    for asked in ("false", "true"):
        tracker = opened(home, "track.wandb=offline", f"track.wandb_code={asked}", name=asked)
        trained(tracker, 1, 1)
        tracker.close(0)
        (path,) = (home / "runs" / asked).glob("wandb/offline-run-*/run-*.wandb")
        artifacts = wandb_files.read_finished(path).artifacts
        found.append([f"{a['type']} {a['name']} {list(a['files'])}" for a in artifacts])
    assert found == [[], ["code true-code ['model.py']"]]


def test_the_best_model_is_known_across_starts(home: Path) -> None:
    aliases: list[set[str]] = []
    for first_step, losses in ((0, {2: math.nan, 3: 2.0, 6: 3.0}), (6, {9: 2.5, 12: 1.5})):
        tracker = opened(home, "track.wandb=offline", "track.wandb_model=checkpoint", first_step=first_step)
        run = home / "runs" / "quickstart"
        (run / "tokenizer").mkdir(exist_ok=True)
        for name in ("config.yaml", "weights"):
            (run / name).write_text("x", encoding="utf-8")
        for step, loss in losses.items():
            tracker.log_validation(step, loss, 1.0, {})
            tracker.log_model(step, run / "weights", ends_phase=False)
        tracker.close(0)
    for path in sorted(home.glob("runs/quickstart/wandb/offline-run-*/run-*.wandb"), key=lambda p: p.stat().st_mtime):
        aliases += [set(artifact["aliases"]) for artifact in wandb_files.read_finished(path).artifacts]
    assert aliases == [
        {"step-2", "latest"},
        {"step-3", "latest", "best"}, {"step-6", "latest"}, {"step-9", "latest"}, {"step-12", "latest", "best"},
    ]  # fmt: skip
