"""The verb: what it prints and writes; and a real grid that is interrupted, killed, and goes on."""

import json
import math
import re
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
import pytest

from smoltrain.config.load import read_run_config
from smoltrain.config.schema import Config
from smoltrain.errors import DONE, FAULT, STOPPED
from smoltrain.estimate.constants import GIB, DeviceSpec
from smoltrain.tune import run_trials
from smoltrain.tune import tune as verb
from smoltrain.tune.tune import tune_recipe
from tests import launches, tiny
from tests.terminals import TerminalSession
from tests.tune.test_trials import step, validation, write_lines

THIS_CPU = DeviceSpec("cpu", "cpu", memory=16 * GIB, half_flops=1e11, fp32_flops=1e11, bandwidth=1e10, link=1e10)


@pytest.fixture
def losses_by_rate(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[float, int], float]], list[Config]]:
    """Instead of training, a run's last loss is a function of its rate and seed; the configs that were trained."""

    def use(loss_of: Callable[[float, int], float]) -> list[Config]:
        trained: list[Config] = []

        def instead(read_config: Callable[[], Config], words: list[str], ranks: int | None, terminal: object) -> int:
            config = read_config()
            trained.append(config)
            phase = config.phases[0]
            loss = loss_of(phase.lr or 0.0, config.run.seed)
            ledger = f"rows of seed {config.run.seed}"
            last = phase.num_steps
            write_lines(config.run_folder / "metrics.jsonl", step(last, ledger=ledger), validation(last, loss))
            return DONE

        monkeypatch.setattr(run_trials, "supervise_config", instead)
        monkeypatch.setattr(verb, "find_device", lambda _name, _world: THIS_CPU)  # seconds of measuring
        return trained

    return use


def tune(folder: Path, lr: str, *words: str, steps: int | None = 8, seeds: int = 1) -> int:
    return tune_recipe("quickstart", [*tiny.words(folder), *words], lr=lr, steps=steps, num_seeds=seeds, ranks=1)


def test_what_is_said_before_and_after(
    tmp_path: Path, losses_by_rate: Callable, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    losses_by_rate(lambda lr, seed: 5 + abs(math.log10(lr / 3e-3)) + 0.01 * seed)
    assert tune(tmp_path, "1e-3,3e-3,9e-3", "run.folder=runs", "seed=1", steps=4, seeds=2) == DONE
    out = capsys.readouterr().out
    assert "runs                   3 lr x 2 seeds = 6, one after another\n" in out
    assert "4 steps of phase main, 1 of warm-up (the recipe: 8 steps, 2 of warm-up); without continuation" in out
    assert "final_lr               moves with --lr, so that the schedule keeps its shape\n" in out
    assert re.search(r"time +about [\d:.]+( s)? for the steps of 6 runs on 1 rank \(estimated\), and the starts", out)
    assert "\nall runs of a seed trained on the same 16 rows in the same order (by their ledgers)\n" in out
    assert (
        "\nthe best, which the recipe has already, as overrides:\n  phases.main.lr=3e-3 phases.main.final_lr=0.0005\n"
        in out
    )
    assert "WARNING: lr" not in out, "it is not at an edge"
    assert "WARNING: 4 steps are 33% of the plan's 12" in out
    assert out.endswith("runs/tune-quickstart/results.json\nruns/tune-quickstart/loss.png\n")
    tree = json.loads(Path("runs/tune-quickstart/results.json").read_text())
    assert tree["best"] == ["phases.main.lr=3e-3", "phases.main.final_lr=0.0005"]
    assert [row["loss"] for row in tree["settings"]] == pytest.approx([5.015, 5.492, 5.492], abs=1e-3)
    assert len(tree["runs"]) == 6
    assert Path("runs/tune-quickstart/loss.png").read_bytes().startswith(b"\x89PNG")


def test_another_grid_takes_the_runs_that_fit(
    tmp_path: Path, losses_by_rate: Callable, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(verb, "draw_grid", lambda *_: None)
    trained = losses_by_rate(lambda lr, seed: 5 - lr)
    tune(tmp_path, "1e-3,2e-3")
    tune(tmp_path, "2e-3,4e-3,8e-3")
    tune(tmp_path, "1e-3,2e-3", seeds=2)
    tune(tmp_path, "1e-3,2e-3", steps=4)
    said = [(config.phases[0].lr, config.phases[0].steps, config.run.seed) for config in trained]
    assert said == [
        *[(1e-3, 8, 1234), (2e-3, 8, 1234)],
        *[(4e-3, 8, 1234), (8e-3, 8, 1234)],
        *[(1e-3, 8, 1235), (2e-3, 8, 1235)],
        *[(1e-3, 4, 1234), (2e-3, 4, 1234)],
    ]
    out = capsys.readouterr().out
    assert "3 lr x 1 seed = 3, one after another, 1 of them trained before" in out
    assert re.search(r"time +about \S+( s)? for the steps of 2 runs \(as those before\), and the starts", out)
    assert "WARNING: lr 8e-3 is the largest that was tried, so the best may lie beyond: try 1.6e-2 too" in out


def test_where_all_diverge_there_is_no_best(
    tmp_path: Path, losses_by_rate: Callable, capsys: pytest.CaptureFixture[str]
):
    losses_by_rate(lambda lr, seed: math.nan)
    assert tune(tmp_path, "1,2") == FAULT
    assert "WARNING: every setting diverged" in capsys.readouterr().out
    tree = json.loads((tmp_path / "runs" / "tune-quickstart" / "results.json").read_text())
    assert tree["best"] is None


def test_rows_that_differ_are_warned_of(
    tmp_path: Path, losses_by_rate: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    trained = losses_by_rate(lambda lr, seed: 5.0)
    tune(tmp_path, "1e-3,2e-3")
    write_lines(trained[0].run_folder / "metrics.jsonl", step(8, ledger="other rows"), validation(8, 4.0))
    tune(tmp_path, "1e-3,2e-3")
    out = capsys.readouterr().out
    assert "WARNING: runs of one seed did not train on the same rows, so their losses cannot be compared" in out
    tune(tmp_path, "1e-3", "batch.accumulation=1,2")
    assert "WARNING: a step has 2 to 4 rows, so the losses are after equal steps" in capsys.readouterr().out


def test_a_phase_in_tokens_has_other_steps_where_the_rows_differ(
    tmp_path: Path, losses_by_rate: Callable, capsys: pytest.CaptureFixture[str]
):
    losses_by_rate(lambda lr, seed: 5.0)
    tokens = ("phases.main.steps=null", "phases.main.tokens=1000")  # of 2 or 4 rows x 16 tokens
    tune(tmp_path, "3e-3", *tokens, "batch.accumulation=1,2", steps=None)
    out = capsys.readouterr().out
    assert (
        "plans                  16 to 32 steps of phase main, as many tokens in each run; without continuation" in out
    )
    assert "validation loss after 16 to 32 steps, nats per token" in out
    assert "\na step has 2 to 4 rows, so the losses are after equal tokens, up to a step, in 16 to 32 steps\n" in out
    assert "equal steps" not in out
    tree = json.loads((tmp_path / "runs" / "tune-quickstart" / "results.json").read_text())
    assert (tree["steps"], sorted(row["steps"] for row in tree["settings"])) == (None, [16, 32])


def test_the_time_that_is_left_is_that_of_the_tokens(
    tmp_path: Path, losses_by_rate: Callable, capsys: pytest.CaptureFixture[str]
):
    trained = losses_by_rate(lambda lr, seed: 5.0)
    tune(tmp_path, "1e-3", "batch.accumulation=2,4")
    for config in trained:
        write_lines(config.run_folder / "metrics.jsonl", step(8, tokens_per_s=1.0), validation(8, 5.0))
    capsys.readouterr()
    tune(tmp_path, "1e-3", "batch.accumulation=2,4,8")
    # 8 steps of 16 rows x 16 targets, one a second
    assert "about 34:08 for the steps of 1 run (as those before), and the starts" in capsys.readouterr().out


# --- a real grid, interrupted and killed

STEPS = 120
WORDS = ("optimizer.beta2=0.9,0.99", "checkpoint.every=20", "track.print_every=50", "engine.compile=off")
RATES = ("3e-3", "1e30")


@dataclass
class RealGrid:
    """A grid of 2 x 2 runs after a Ctrl-C in its first run, a kill -9 in its third, and a third command."""

    home: Path
    interrupted: list[str]  # what stood on the terminal
    finished: list[str]
    codes: list[int]
    first_run_after_the_kill: dict[str, bytes]

    def folders(self, start: str) -> list[Path]:
        return sorted(path.parent for path in self.home.glob(f"{start}*/config.yaml"))


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> RealGrid:
    folder = tmp_path_factory.mktemp("grid")
    words = [
        word for word in tiny.words(folder) if not word.startswith(("run.folder=", "checkpoint.", "evaluate.every"))
    ]
    options = ["--lr", ",".join(RATES), "--steps", str(STEPS), "--ranks", "1"]
    command = [str(launches.BIN / "smoltrain"), "tune", "quickstart", *words, *WORDS, *options]
    home = folder / "runs" / "tune-quickstart"

    # ---- Ctrl-C in the first run
    session = TerminalSession(command, folder, 80, 24, OMP_NUM_THREADS="1")
    session.read_until(lambda raw: re.search(r"step (2[1-9]|[3-9]\d)/120", raw))
    session.press(b"\x03")
    codes = [session.finish()]
    interrupted = session.lines

    # ---- kill -9 in the third: behind it are a whole run and one that diverged
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=launches.environment())
    launches.wait_until(lambda: any_step(home, "beta2-0.99_lr-3e-3_", 30), 600)
    process.send_signal(signal.SIGKILL)
    process.wait()
    [first] = home.glob("beta2-0.9_lr-3e-3_*")
    kept = {str(path): path.read_bytes() for path in sorted(first.rglob("*")) if path.is_file()}

    # ---- to the end
    session = TerminalSession(command, folder, 80, 24, OMP_NUM_THREADS="1")
    codes.append(session.finish())
    return RealGrid(home, interrupted, session.lines, codes, kept)


def any_step(home: Path, name: str, number: int) -> bool:
    return any(line["step"] >= number for folder in home.glob(f"{name}*") for line in launches.metrics(folder))


@pytest.mark.slow
@pytest.mark.timeout(1200)  # five starts of ranks and five commands, in the fixture
def test_a_ctrl_c_stops_the_grid_and_says_so(grid: RealGrid):
    assert grid.codes == [STOPPED, DONE]
    assert "stopping after this step, then saving; Ctrl-C again leaves at once" in grid.interrupted
    assert "0 of 4 runs are done; the same command goes on from there" in grid.interrupted


@pytest.mark.slow
def test_runs_that_were_stopped_or_killed_go_on_from_a_checkpoint(grid: RealGrid):
    for name, least in (("beta2-0.9_lr-3e-3_", 20), ("beta2-0.99_lr-3e-3_", 20)):
        [folder] = grid.folders(name)
        starts = re.findall(r"from_step: (\d+)", (folder / "config.yaml").read_text())
        assert len(starts) == 2
        assert int(starts[1]) >= least
        assert sorted(launches.losses(folder)) == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_what_was_finished_is_untouched(grid: RealGrid):
    for path, content in grid.first_run_after_the_kill.items():
        assert Path(path).read_bytes() == content, path


@pytest.mark.slow
def test_a_run_that_diverges_is_a_result(grid: RealGrid):
    told = [line for line in grid.finished if re.match(r"\d/4  beta2 0.99?, lr 1e30 .* diverged at step \d", line)]
    assert len(told) == 2
    for folder in grid.folders("beta2-0.9_lr-1e30_"):
        assert (folder / "spikes.jsonl").exists()


@pytest.mark.slow
def test_all_runs_train_on_the_same_rows_and_share_one_tokenizer(grid: RealGrid):
    first, second = grid.folders("beta2-0.9_lr-3e-3_") + grid.folders("beta2-0.99_lr-3e-3_")
    ledger = np.fromfile(first / "ledger.bin", "<u8")
    assert len(ledger) == STEPS * 4
    assert np.array_equal(ledger, np.fromfile(second / "ledger.bin", "<u8"))
    for folder in grid.folders("beta2-"):
        rows = np.fromfile(folder / "ledger.bin", "<u8")
        assert np.array_equal(rows, ledger[: len(rows)])
        assert not list((folder / "data").rglob("*.bin")), "the tokens are in the cache"
        assert not (folder / "checkpoints").exists()
    assert len([path for path in (grid.home / "cache").iterdir() if path.is_dir()]) == 1


@pytest.mark.slow
def test_the_best_is_that_of_the_metrics(grid: RealGrid):
    """By its own reading of the files: the last validation loss of each run."""
    losses: dict[float, float] = {}
    for folder in grid.folders("beta2-"):
        lines = launches.metrics(folder)
        last = [line for line in lines if line["step"] == STEPS and "validation/loss_nats_per_token" in line]
        if last:
            config = read_run_config(folder / "config.yaml")
            losses[config.optimizer.beta2] = last[-1]["validation/loss_nats_per_token"]
    assert sorted(losses) == [0.9, 0.99]
    best = min(losses, key=lambda beta2: losses[beta2])
    tree = json.loads((grid.home / "results.json").read_text())
    assert tree["best"] == [f"optimizer.beta2={best:g}", "phases.main.lr=3e-3", "phases.main.final_lr=0.0005"]
    assert tree["settings"][0]["loss"] == mean([losses[best]])
    assert [bool(row["diverged_at"]) for row in tree["settings"]] == [False, False, True, True]


@pytest.mark.slow
def test_the_screen_of_80_columns(grid: RealGrid):
    """That no line wraps is asserted where they are read."""
    text = "\n".join(grid.finished)
    assert "runs                   2 beta2 x 2 lr x 1 seed = 4, one after another, " in text
    assert re.search(r"^beta2 +lr +loss +tokens/s$", text, re.MULTILINE)
    assert "trained before" in text
    assert f"  optimizer.beta2={'0.9' if 'beta2=0.9 ' in text else '0.99'} phases.main.lr=3e-3" in text
    assert not re.search("[⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏]", text)
