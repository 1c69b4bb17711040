"""From the words of a command line to checked runs; every mistake is met before one starts."""

from pathlib import Path

import pytest

from smoltrain.config.load import load_config
from smoltrain.errors import UserError
from smoltrain.tune.planning import Tuning, plan_tuning
from tests import tiny


def plan(
    folder: Path, *words: str, lr: str | None = "1e-3,3e-3", steps: int | None = 6, seeds: int = 1, ranks: int = 1
) -> Tuning:
    return plan_tuning(
        "quickstart", [*tiny.words(folder), *words], lr=lr, steps=steps, num_seeds=seeds, ranks=ranks
    )  # fmt: skip


def test_the_grid_of_all_axes_with_each_seed(tmp_path: Path):
    tuning = plan(tmp_path, "optimizer.beta2=0.95,0.99", "eps=1e-7", seeds=2)
    assert [axis.key for axis in tuning.axes] == ["optimizer.beta2", "phases.main.lr"]
    assert [str(trial) for trial in tuning.trials[:5]] == [
        "beta2 0.95, lr 1e-3, seed 1234",
        "beta2 0.95, lr 3e-3, seed 1234",
        "beta2 0.99, lr 1e-3, seed 1234",
        "beta2 0.99, lr 3e-3, seed 1234",
        "beta2 0.95, lr 1e-3, seed 1235",
    ]
    third = tuning.trials[2].config
    assert (third.optimizer.beta2, third.optimizer.eps) == (0.99, 1e-7)
    assert third.phases[0].lr == 1e-3
    assert third.phases[0].final_lr == pytest.approx(1e-3 * 5e-4 / 3e-3, rel=1e-5)
    assert (third.phases[0].steps, third.phases[0].warmup_steps) == (6, 2)  # of 8 and 2
    assert (tuning.planned_steps, tuning.rows_per_step, tuning.steps) == (12, {4}, (6,))
    assert len({trial.folder for trial in tuning.trials}) == 8
    assert not (tmp_path / "runs").exists(), "nothing is written"


def test_what_differs_between_runs_are_the_keys_of_the_axes_alone(tmp_path: Path):
    one, other = (trial.config.model_dump() for trial in plan(tmp_path).trials)
    assert one.pop("run") | {"name": ""} == other.pop("run") | {"name": ""}
    [phase], [other_phase] = one.pop("phases"), other.pop("phases")
    assert one == other
    assert {key for key in phase if phase[key] != other_phase[key]} == {"lr", "final_lr"}


def test_the_recipes_own_setting_is_known(tmp_path: Path):
    tuning = plan(tmp_path)
    assert tuning.recipes_own == tuning.trials[1].point
    assert plan(tmp_path, lr="1e-3,2e-3").recipes_own is None


def test_without_steps_it_is_the_first_phase_as_it_stands(tmp_path: Path):
    own = load_config("quickstart", tiny.words(tmp_path)).phases[0]
    assert plan(tmp_path, steps=None).trials[1].config.phases == (own,)


def test_tokens_are_counted_in_steps(tmp_path: Path):
    tokens = ("phases.main.steps=null", "phases.main.tokens=1000")  # of 4 rows x 16 tokens: 16 steps, 2 of warm-up
    tuning = plan(tmp_path, *tokens)
    assert (tuning.phase.steps, tuning.planned_steps) == (16, 20)
    assert tuning.trials[0].config.phases[0].warmup_steps == 1
    with pytest.raises(UserError, match=r"nobody can say how many steps phases.main.epochs=3 are"):
        plan(tmp_path, "phases.main.steps=null", "phases.main.epochs=3")
    assert plan(tmp_path, "phases.continuation.steps=null", "phases.continuation.epochs=3").planned_steps is None, (
        "it is not trained"
    )


def test_a_cadence_of_evaluations_that_is_asked_for(tmp_path: Path):
    words = [word for word in tiny.words(tmp_path) if not word.startswith("evaluate.every")]
    tuning = plan_tuning("quickstart", words, lr="1e-3,2e-3", steps=6, num_seeds=1, ranks=1)
    assert tuning.trials[0].config.evaluate.every == 2, "at 2, 4 and 6"
    assert plan(tmp_path, "evaluate.every=5").trials[0].config.evaluate.every == 5
    assert plan(tmp_path, "evaluate.every=0").trials[0].config.evaluate.every == 6, "at the end"


def test_tokens_are_shared_where_they_are_cached(tmp_path: Path):
    assert plan(tmp_path).trials[0].config.data.cache == tmp_path / "runs" / "tune-quickstart" / "cache"
    assert plan(tmp_path, "data.mode=stream").trials[0].config.data.cache is None


def test_settings_may_differ_in_the_rows_of_a_step(tmp_path: Path):
    tuning = plan(tmp_path, "batch.accumulation=1,2", lr=None)
    assert (tuning.rows_per_step, tuning.steps) == ({2, 4}, (6,))
    tokens = ("phases.main.steps=null", "phases.main.tokens=1000")  # of 2 or 4 rows x 16 tokens
    tuning = plan(tmp_path, *tokens, "batch.accumulation=1,2", lr=None, steps=None)
    assert (tuning.rows_per_step, tuning.steps, tuning.phase.steps) == ({2, 4}, (16, 32), 16)


def test_the_weights_to_begin_with_are_named_by_their_folder(tmp_path: Path):
    """The runs of a grid live in a folder of their own, in which the name of a run means none."""
    tiny.enter_run_folder(tiny.load(tmp_path, "run.name=first"), 1, 0)
    for source in ("first", "first/checkpoints/step-00000007"):
        tuning = plan(tmp_path, f"init.from={source}")
        assert {trial.config.init.source for trial in tuning.trials} == {str(tmp_path / "runs" / source)}
        assert tuning.recipes_own == tuning.trials[1].point
    with pytest.raises(UserError, match=r"no such run: saw 'second', want .*first.*; change init.from"):
        plan(tmp_path, "init.from=first,second", lr=None)
    with pytest.raises(UserError, match=r"the runs of a grid begin at their first step: saw init.load=all"):
        plan(tmp_path, "init.from=first", "init.load=all")


@pytest.mark.parametrize(
    ("words", "lr", "messages"),
    [
        ([], None, ["there is nothing to compare"]),
        ([], "3e-3,0.003", ["two settings are the same run: saw lr 3e-3 and lr 0.003"]),
        ([], "1e-3,fast", ["phases.main.lr is not valid: saw 'fast', want a number"]),
        (["phases.main.lr=1e-3,2e-3"], "1e-3,2e-3", ["a key is an axis twice: saw phases.main.lr"]),
        (["phases.main.lr=1e-4,1e-3"], None, ["phases.main ends above its peak: saw 0.0005, want at most"]),
        (["optimizer.knd=adamw,muon"], None, ["unknown key optimizer.knd: saw 'knd', want 'kind'"]),
        (["optimizer.beta1=0.9,1.5"], None, ["optimizer.beta1 is not valid: saw '1.5'"]),
        (["hidden_size=32,30"], None, ["the heads do not divide the width: saw 30"]),
        (["seed=1,2"], None, ["run.seed cannot be an axis: saw 2 values, want one value (--seeds N"]),
        (["data.path=/a,b"], None, ["data.path cannot be an axis", "a text with a comma in it stands in quotes"]),
        (["batch.micro_batch=2,3"], None, []),  # 6 rows of a step: they are what accumulation makes of them
        (["engine.ds_config=zero2,missing.json"], None, ["missing.json"]),
    ],
)
def test_mistakes_are_met_before_anything_is_written(
    tmp_path: Path, words: list[str], lr: str | None, messages: list[str]
):
    if not messages:
        plan(tmp_path, *words, lr=lr)
        return
    with pytest.raises(UserError) as refused:
        plan(tmp_path, *words, lr=lr)
    assert all(message in str(refused.value) for message in messages), refused.value
    assert not (tmp_path / "runs").exists()


def test_every_mistake_of_an_axis_is_told_once(tmp_path: Path):
    with pytest.raises(UserError) as refused:
        plan(tmp_path, "optimizer.beta1=2,3,0.9", "optimizer.eps=1e-8,1e-7")
    assert [problem.saw for problem in refused.value.problems] == ["'2'", "'3'"]


def test_the_last_seed_fits(tmp_path: Path):
    with pytest.raises(UserError, match="the last seed is too large"):
        plan(tmp_path, f"run.seed={2**63 - 1}", seeds=2)
