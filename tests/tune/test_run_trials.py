"""One run after another: what is done stays, what diverges is a result, what fails ends the whole.

In place of the supervisor stands a function that writes what a run would have written.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from smoltrain.config.load import load_config
from smoltrain.config.schema import Config
from smoltrain.data.tokens.index import data_index_file
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.errors import BAD_INPUT, DONE, FAULT, INTERRUPTED, STOPPED, Problem, TrainingStopped, UserError
from smoltrain.tune import run_trials
from smoltrain.tune.grid import GridPoint
from smoltrain.tune.run_trials import Pace, TrialLine, find_shared_cache, list_last_errors, train_trials
from smoltrain.tune.trials import QUIET_WORDS, Trial, make_trial
from tests import tiny
from tests.tune.test_trials import step, validation, write_lines


@pytest.fixture
def trials(tmp_path: Path) -> list[Trial]:
    """Three, of four steps each."""
    made: list[Trial] = []
    for lr in ("1e-3", "2e-3", "4e-3"):
        config = load_config("quickstart", [*QUIET_WORDS, f"run.folder={tmp_path}", f"phases.main.lr={lr}"])
        phase = config.phases[0].model_copy(update={"steps": 4, "warmup_steps": 1})
        point = GridPoint((("phases.main.lr", lr),), ())
        made.append(make_trial(point, config, phase, 7, 8, tmp_path / "cache", 1))
    return made


def finish(config: Config) -> int:
    """What a run leaves that is done."""
    print("phase main: steps 1 to 4")
    write_lines(config.run_folder / "metrics.jsonl", step(4), validation(4, 5.0))
    (config.run_folder / "checkpoints" / "step-00000004").mkdir(parents=True)
    return DONE


def diverge(config: Config) -> int:
    """What a run leaves whose loss is no number."""
    print("phase main: steps 1 to 4")
    print("error: the loss of step 2 is nan", file=sys.stderr)
    write_lines(config.run_folder / "metrics.jsonl", step(1))
    write_lines(config.run_folder / "spikes.jsonl", {"step": 2, "does": "stop", "rows": [0, 8]})
    return FAULT


@pytest.fixture
def supervised(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float | None, Callable[[Config], int]]]:
    """(rate that was trained, what it did): the doings are to be filled in, the rates are filled in."""
    calls: list[tuple[float | None, Callable[[Config], int]]] = []

    def instead(read_config: Callable[[], Config], words: list[str], ranks: int | None, terminal: object) -> int:
        number = next(number for number, (lr, _) in enumerate(calls) if lr is None)
        config = read_config()
        calls[number] = (config.phases[0].lr, calls[number][1])
        return calls[number][1](config)

    monkeypatch.setattr(run_trials, "supervise_config", instead)
    return calls


def test_runs_are_trained_in_order_and_told_a_line_each(
    trials: list[Trial], supervised: list, capfd: pytest.CaptureFixture[str]
):
    supervised += [(None, finish), (None, diverge), (None, finish)]
    code, outcomes = train_trials(trials, 1, ["quickstart"])
    assert code == DONE
    assert [outcome.diverged_at for outcome in outcomes] == [None, 2, None]
    assert [lr for lr, _ in supervised] == [1e-3, 2e-3, 4e-3]
    out, err = capfd.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert [line.rpartition("  ")[0] for line in lines] == [
        "1/3  lr 1e-3  seed 7  loss 5.0000  100 tokens/s",
        "2/3  lr 2e-3  seed 7  diverged at step 2  100 tokens/s",
        "3/3  lr 4e-3  seed 7  loss 5.0000  100 tokens/s",
    ]
    log = trials[1].folder / "logs" / "console.log"
    assert log.read_text() == "phase main: steps 1 to 4\nerror: the loss of step 2 is nan\n"


def test_what_is_done_is_not_done_again(trials: list[Trial], supervised: list, capfd: pytest.CaptureFixture[str]):
    finish(trials[0].config)
    diverge(trials[1].config)
    capfd.readouterr()
    supervised.append((None, finish))
    code, outcomes = train_trials(trials, 1, [])
    assert (code, len(outcomes), supervised[0][0]) == (DONE, 3, 4e-3)
    lines = capfd.readouterr().out.splitlines()
    assert [line.rpartition("  ")[2] for line in lines[:2]] == ["trained before", "trained before"]


def test_a_run_that_ended_keeps_no_checkpoints_but_all_else(trials: list[Trial], supervised: list):
    finish(trials[0].config)  # and a kill before they were deleted
    supervised += [(None, finish), (None, finish)]
    train_trials(trials, 1, [])
    for trial in trials:
        assert not (trial.folder / "checkpoints").exists()
        assert (trial.folder / "metrics.jsonl").exists()


@pytest.mark.parametrize("code", [STOPPED, INTERRUPTED])
def test_a_stop_ends_the_whole_and_keeps_what_was_saved(
    trials: list[Trial], supervised: list, code: int, capfd: pytest.CaptureFixture[str]
):
    def stop(config: Config) -> int:
        write_lines(config.run_folder / "metrics.jsonl", step(2))
        (config.run_folder / "checkpoints" / "step-00000002").mkdir(parents=True)
        return code

    supervised += [(None, finish), (None, stop)]
    ended, outcomes = train_trials(trials, 1, [])
    assert (ended, len(outcomes)) == (code, 1)
    assert (trials[1].folder / "checkpoints" / "step-00000002").exists()
    out, err = capfd.readouterr()
    assert (out.splitlines()[-1], err) == ("1 of 3 runs are done; the same command goes on from there", "")


def test_a_run_that_was_stopped_after_its_last_validation_counts(trials: list[Trial], supervised: list):
    def stop_at_the_end(config: Config) -> int:
        finish(config)
        return STOPPED

    supervised.append((None, stop_at_the_end))
    code, outcomes = train_trials(trials, 1, [])
    assert (code, len(outcomes)) == (STOPPED, 1)


@pytest.mark.parametrize("code", [FAULT, BAD_INPUT])
def test_a_run_that_fails_ends_the_whole_with_its_error(
    trials: list[Trial], supervised: list, code: int, capfd: pytest.CaptureFixture[str]
):
    def fail(config: Config) -> int:
        print("phase main: steps 1 to 4")
        print("error: no space left on device", file=sys.stderr)
        return code

    supervised.append((None, fail))
    assert train_trials(trials, 1, []) == (code, [])
    out, err = capfd.readouterr()
    folder = trials[0].folder
    assert err.splitlines() == [
        "error: no space left on device",
        f"error: the run {folder} failed; all it printed is in {folder / 'logs' / 'console.log'}",
    ]
    assert out == "0 of 3 runs are done; the same command goes on from there\n"


def test_a_mistake_that_a_run_raises_is_raised_on_the_console_of_before(
    trials: list[Trial], supervised: list, capfd: pytest.CaptureFixture[str]
):
    def refuse(_config: Config) -> int:
        print("hidden")
        raise UserError(Problem("a", "b", "c", "d"))

    supervised.append((None, refuse))
    with pytest.raises(UserError):
        train_trials(trials, 1, [])
    print("shown")
    assert capfd.readouterr().out == "shown\n"


def test_a_run_that_is_done_without_a_loss_is_no_result(trials: list[Trial], supervised: list):
    supervised.append((None, lambda _config: DONE))
    with pytest.raises(TrainingStopped, match="ended without a validation loss"):
        train_trials(trials, 1, [])


def test_errors_are_those_of_the_last_start(tmp_path: Path):
    log = tmp_path / "console.log"
    log.write_text("phase main: a\nerror: old\nphase main: b\nstep 1\nerror: new\nerror: newer\n")
    assert list(list_last_errors(log)) == ["error: new", "error: newer"]
    log.write_text("error: before any phase\n")
    assert list(list_last_errors(log)) == ["error: before any phase"]


def test_the_pace_is_that_of_whole_runs(monkeypatch: pytest.MonkeyPatch):
    clock = [0.0]
    monkeypatch.setattr(run_trials.time, "monotonic", lambda: clock[0])
    pace = Pace(4)
    assert pace.estimate_left_s(5.0) is None
    pace.leave_out()  # trained before
    clock[0] = 100.0
    pace.add(100.0)
    assert pace.estimate_left_s(130.0) == 170.0  # two more, 30 s into the first
    clock[0] = 160.0
    pace.add(60.0)
    assert pace.estimate_left_s(160.0) == 80.0
    assert pace.estimate_left_s(400.0) == 0.0


@pytest.mark.parametrize("width", [20, 40, 69, 70, 77, 120])
def test_the_moving_line_fits(trials: list[Trial], width: int):
    write_lines(trials[0].folder / "metrics.jsonl", step(2), step(3), validation(3, 5.0))
    console = Console(width=width, file=sys.stderr)
    pace = Pace(3)
    pace.add(100.0)
    line = TrialLine(console, trials[0], "1/3", pace)
    with console.capture() as captured:
        console.print(line(width))
    [text] = captured.get().splitlines()
    assert len(text.rstrip()) <= width
    assert "1/3" in text
    if width >= 40:
        assert "step 3/4" in text
    if width == 120:
        assert "lr 1e-3, seed 7" in text
        assert "loss 5.000" in text
        assert "left " in text


def test_before_its_first_step_a_run_is_said_to_start(trials: list[Trial]):
    console = Console(width=80, file=sys.stderr)
    with console.capture() as captured:
        console.print(TrialLine(console, trials[0], "1/3", Pace(3))(77))
    assert "1/3  lr 1e-3, seed 7  starting" in captured.get()


def test_tokens_are_shared_in_cached_mode_alone(tmp_path: Path):
    assert find_shared_cache(tiny.load(tmp_path)) == tmp_path / "runs" / "tune-quickstart" / "cache"
    assert find_shared_cache(tiny.load(tmp_path, "data.cache=mine")) == Path("mine")
    assert find_shared_cache(tiny.load(tmp_path, "data.mode=stream")) is None


def test_runs_that_stream_share_what_the_first_has_prepared(tmp_path: Path, supervised: list):
    made: list[Trial] = []
    for seed, rows in ((1, 4), (2, 4), (3, 8)):
        config = tiny.load(tmp_path, "data.mode=stream", f"batch.accumulation={rows // 2}")
        point = GridPoint((("batch.accumulation", str(rows // 2)),), ())
        made.append(make_trial(point, config, config.phases[0].model_copy(update={"steps": 4}), seed, rows, None, 4))

    def prepare(config: Config) -> int:
        prepared = data_index_file(config.run_folder).exists()
        found.append(prepared)
        prepare_run_data(config)
        return finish(config)

    found: list[bool] = []
    supervised += [(None, prepare)] * 3
    train_trials(made, 1, [])
    assert found == [False, True, False], "the number of streams depends on the rows of a step"
    first, second, _ = (trial.folder for trial in made)
    for file in ("tokenizer/tokenizer.json", "data/index.json"):
        assert (second / file).read_bytes() == (first / file).read_bytes()
