"""What a run of a grid is made of, its name, and what its records say of how it ended."""

import math
from pathlib import Path
from typing import Any

import pytest

from smoltrain import files
from smoltrain.config.load import load_config
from smoltrain.tune.grid import GridPoint
from smoltrain.tune.trials import QUIET_WORDS, Outcome, Trial, find_other_rows, make_trial, read_outcome, tuning_folder

STEP = {"train/loss_nats_per_token": 5.0, "speed/step_s": 1.0}


def trial(folder: Path, *words: str, seed: int = 7, rows: int = 8, cache: Path | None = None) -> Trial:
    """Of four steps."""
    config = load_config("quickstart", [*QUIET_WORDS, f"run.folder={folder}", *words])
    phase = config.phases[0].model_copy(update={"steps": 4, "warmup_steps": 1})
    point = GridPoint((("phases.main.lr", "2e-3"),), ("phases.main.lr=2e-3",))
    return make_trial(point, config, phase, seed, rows, cache, 1)


def write_lines(path: Path, *lines: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(map(files.format_json_line, lines)))


def step(number: int, tokens_per_s: float = 100.0, ledger: str = "") -> dict[str, Any]:
    return {"step": number, **STEP, "speed/tokens_per_s": tokens_per_s, "data/ledger": ledger or f"after {number}"}


def validation(number: int, loss: float) -> dict[str, Any]:
    return {"step": number, "validation/loss_nats_per_token": loss}


# --- what it is


def test_a_run_of_a_grid_is_one_quiet_phase_in_the_grids_folder(tmp_path: Path):
    made = trial(tmp_path, "run.name=mine", "run.stop_after=main", cache=tmp_path / "cache")
    config = made.config
    assert (
        tuning_folder(load_config("quickstart", [f"run.folder={tmp_path}", "run.name=mine"])) == tmp_path / "tune-mine"
    )
    assert made.folder.parent == tmp_path / "tune-mine"
    assert [phase.name for phase in config.phases] == ["main"]
    assert (made.steps, made.seed, config.run.stop_after, config.evaluate.every) == (4, 7, None, 1)
    assert (config.sample.every, config.track.wandb, config.track.gradients_every) == (0, "off", 0)
    assert (config.checkpoint.keep_last, config.checkpoint.keep_every, config.checkpoint.keep_best) == (1, 0, False)
    assert config.data.cache == tmp_path / "cache"
    assert config.track.wandb_group == "tune-mine"
    assert str(made) == "lr 2e-3, seed 7"


def test_what_the_command_line_says_wins(tmp_path: Path):
    config = trial(
        tmp_path, "track.wandb=offline", "track.wandb_group=own", "data.cache=/shared", cache=tmp_path
    ).config
    assert (config.track.wandb, config.track.wandb_group, config.data.cache) == ("offline", "own", Path("/shared"))


@pytest.mark.parametrize(
    ("words", "more"),
    [
        (["optimizer.eps=1e-7"], {}),
        (["phases.main.weight_decay=0.2"], {}),
        (["model.hidden_size=128"], {}),
        (["engine.precision=fp32"], {}),
        (["evaluate.rows=32"], {}),
        (["data.validation_share=0.1"], {}),
        (["init.from=somewhere"], {}),
        ([], {"seed": 8}),
        ([], {"rows": 16}),
    ],
)
def test_whatever_weights_or_losses_depend_on_is_another_run(tmp_path: Path, words: list[str], more: dict[str, Any]):
    assert trial(tmp_path, *words, **more).folder != trial(tmp_path).folder


@pytest.mark.parametrize(
    "words",
    [
        ["checkpoint.every=7"],
        ["track.wandb=offline"],
        ["generation.top_k=3"],
        ["sample.every=2"],
        ["data.cache=/elsewhere"],
        ["engine.hang_s=7"],
        ["phases.continuation.lr=1e-5"],  # which is not trained
    ],
)
def test_whatever_they_do_not_depend_on_is_the_same_run(tmp_path: Path, words: list[str]):
    assert trial(tmp_path, *words).folder == trial(tmp_path).folder


# --- how it ended


def test_a_run_that_has_not_begun_or_is_half_done_has_no_outcome(tmp_path: Path):
    made = trial(tmp_path)
    assert read_outcome(made) is None
    write_lines(made.folder / "metrics.jsonl", step(1), validation(2, 5.0), step(3))
    assert read_outcome(made) is None


def test_the_outcome_is_the_validation_at_the_last_step(tmp_path: Path):
    made = trial(tmp_path)
    lines = [step(1, 10), validation(2, 5.5), step(2, 300), step(3, 200), step(4, 250, "all"), validation(4, 4.5)]
    write_lines(made.folder / "metrics.jsonl", *lines)
    assert read_outcome(made) == Outcome(4.5, None, 225.0, "all", ((2, 5.5), (4, 4.5)))


def test_a_spike_that_ended_the_run_is_an_outcome(tmp_path: Path):
    made = trial(tmp_path)
    write_lines(made.folder / "metrics.jsonl", step(1), step(2))
    write_lines(made.folder / "spikes.jsonl", {"step": 2, "does": "skip", "rows": [0, 8]})
    assert read_outcome(made) is None, "which was skipped"
    write_lines(made.folder / "spikes.jsonl", {"step": 3, "does": "stop", "rows": [16, 24]})
    outcome = read_outcome(made)
    assert outcome is not None
    assert outcome.diverged_at == 3
    assert math.isnan(outcome.loss)


def test_a_last_loss_that_is_no_number_diverged(tmp_path: Path):
    made = trial(tmp_path)
    write_lines(made.folder / "metrics.jsonl", step(4), validation(4, math.nan))
    outcome = read_outcome(made)
    assert outcome is not None
    assert outcome.diverged_at == 4


def test_a_spike_before_the_end_that_was_reached_is_no_end(tmp_path: Path):
    made = trial(tmp_path)
    write_lines(made.folder / "metrics.jsonl", step(4), validation(4, 4.5))
    write_lines(made.folder / "spikes.jsonl", {"step": 2, "does": "stop", "rows": [0, 8]})
    outcome = read_outcome(made)
    assert outcome is not None
    assert (outcome.loss, outcome.diverged_at) == (4.5, None)


def test_runs_of_a_seed_are_compared_by_their_ledgers(tmp_path: Path):
    runs = [trial(tmp_path, seed=seed) for seed in (1, 1, 2, 2, 2)]
    outcomes = [Outcome(1.0, None, 1.0, ledger, ()) for ledger in ("a", "a", "b", "b", "b")]
    assert find_other_rows(runs, outcomes) == []
    outcomes[3] = Outcome(1.0, None, 1.0, "c", ())
    assert find_other_rows(runs, outcomes) == [(runs[2], runs[3])]
    outcomes[3] = Outcome(math.nan, 3, 1.0, "c", ())
    assert find_other_rows(runs, outcomes) == [], "of a run that ended early"
