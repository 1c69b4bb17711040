"""What is said in one of several ways: the command line's takes the place of the recipe's."""

from pathlib import Path

import pytest

from smoltrain.config.load import config_to_yaml, load_config
from smoltrain.errors import UserError
from tests.config.test_load import EXAMPLE, EXAMPLE_TEXT, problem, written


@pytest.mark.parametrize(
    ("overrides", "main", "continuation"),
    [
        (["phases.main.tokens=400M"], {"tokens": 400_000_000}, {"steps": 50}),
        (["phases.main.epochs=0.5", "phases.continuation.tokens=9"], {"epochs": 0.5}, {"tokens": 9}),
        (["phases.main.tokens=9", "phases.main.tokens=null", "phases.main.steps=70"], {"steps": 70}, {"steps": 50}),
        (["phases.main.steps=null", "phases.main.tokens=9"], {"tokens": 9}, {"steps": 50}),
        (["phases.main.tokens=null"], {"steps": 500}, {"steps": 50}),
    ],
)
def test_a_length_on_the_command_line_takes_the_place_of_the_recipes(
    overrides: list[str], main: dict[str, float], continuation: dict[str, float]
):
    assert [phase.horizon for phase in load_config(EXAMPLE, overrides).phases] == [main, continuation]


def test_a_recipe_in_tokens_may_be_given_steps(tmp_path: Path):
    recipe = written(tmp_path, EXAMPLE_TEXT.replace("steps: 500\n", "tokens: 1.5B\n"))
    assert load_config(recipe).phases[0].horizon == {"tokens": 1_500_000_000}
    assert load_config(recipe, ["phases.main.steps=30"]).phases[0].horizon == {"steps": 30}
    text = config_to_yaml(load_config(recipe))
    assert load_config(written(tmp_path, text, "again.yaml")) == load_config(recipe).model_copy(
        update={"run": load_config(written(tmp_path, text, "again.yaml")).run}
    )


def test_a_length_is_given_once():
    keys = "phases.main.steps or phases.main.tokens or phases.main.epochs on the command line"
    both = problem("phases.main.tokens=400M", "phases.main.steps=500")
    assert str(both) == (
        "phases.main is not given its length exactly once: saw steps=500, tokens=4e+08, want one of steps, tokens and "
        f"epochs; change {keys}"
    )
    assert problem("phases.main.steps=null").saw == "none of them"


def test_rows_on_the_command_line_take_the_place_of_the_recipes():
    batch = load_config(EXAMPLE, ["batch.rows_per_step=64"]).batch
    assert (batch.rows_per_step, batch.accumulation) == (64, None)
    batch = load_config("smollm2-135m", ["batch.accumulation=3"]).batch
    assert (batch.rows_per_step, batch.accumulation) == (None, 3)


def test_an_optimizer_on_the_command_line_drops_what_only_the_recipes_own_understood() -> None:
    assert load_config("quickstart").optimizer.momentum == 0.85
    optimizer = load_config("quickstart", ["optimizer=adamw"]).optimizer
    assert (optimizer.kind, optimizer.momentum) == ("adamw", 0.95)
    assert load_config("quickstart", ["optimizer=muon"]).optimizer.momentum == 0.85
    with pytest.raises(UserError, match="momentum is of muon alone"):
        load_config("quickstart", ["optimizer=adamw", "optimizer.momentum=0.85"])
