"""Each value and key that does not fit is one problem, which names the place that it came from."""

from pathlib import Path

import pytest

from smoltrain.config.load import config_to_yaml, load_config, read_run_config
from smoltrain.errors import UserError
from tests.config.test_load import EXAMPLE_TEXT, problem, written


@pytest.mark.parametrize(
    ("override", "key", "want"),
    [
        ("model.hiden_size=3", "model.hiden_size", "'hidden_size'"),
        ("phases.main.warm_up_steps=3", "phases.main.warm_up_steps", "'warmup_steps'"),
        ("tokenizer.sep=x", "tokenizer.sep", "'separator'"),
        ("track.zzz=3", "track.zzz", "one of gradients_every, print_every"),
    ],
)
def test_an_unknown_key_is_met_with_the_nearest(override: str, key: str, want: str):
    found = problem(override)
    assert found.what == f"unknown key {key}"
    assert found.want.startswith(want)
    assert found.change == f"{key} on the command line"


@pytest.mark.parametrize(
    ("override", "want"),
    [
        ("batch.micro_batch=0", "'auto' or greater than 0"),
        ("batch.micro_batch=many", "'auto' or a whole number"),
        ("batch.sequence_length=1.5", "a whole number"),
        ("batch.sequence_length=true", "a whole number"),
        ("phases.main.lr=fast", "a number"),
        ("phases.main.lr=-1", "greater than 0"),
        ("phases.main.lr=inf", "a finite number"),
        ("phases.main.lr=nan", "a finite number"),
        ("generation.top_p=1.1", "less than or equal to 1"),
        ("model.dropout=1", "less than 1"),
        ("model.norm=batchnorm", "'rmsnorm' or 'layernorm'"),
        ("model.tie_word_embeddings=perhaps", "true or false"),
        ("engine.gradient_checkpointing=some", "'auto', 'none', 'selective' or 'full' or a whole number"),
        ("run.name=../elsewhere", "a plain name, as in main-2"),
        ("run.name=[a]", "text"),
        ("phases.main.name='a b'", "a plain name, as in main-2"),
        ("sample.prompts=hello", "a list, as in [a, b]"),
        ("phases=3", "a list, as in [a, b]"),
        ("phases=[3]", "a section of `key: value` lines"),
        ("run=null", "a section of `key: value` lines"),
        ("data=a.txt", "data.path=a.txt, or another of its keys, which `smoltrain explain data` lists"),
        ("run=mine", "run.name=mine, or another of its keys, which `smoltrain explain run` lists"),
    ],
)
def test_a_value_that_does_not_fit_is_one_problem(override: str, want: str):
    found = problem(override)
    assert found.what.endswith(" is not valid")
    assert found.want == want


def test_a_missing_value(tmp_path: Path):
    found = problem(recipe=written(tmp_path, EXAMPLE_TEXT.replace("  hidden_size: 192\n", "")))
    assert (
        str(found) == "model.hidden_size is missing: saw nothing, want a value; change model.hidden_size in mine.yaml"
    )


def test_a_problem_names_the_place_its_value_came_from(tmp_path: Path):
    recipe = written(tmp_path, EXAMPLE_TEXT.replace("hidden_size: 192", "hidden_size: 0"))
    assert problem(recipe=recipe).change == "model.hidden_size in mine.yaml"
    assert problem("model.hidden_size=-1", recipe=recipe).change == "model.hidden_size on the command line"
    assert problem("phases.main.final_lr=1").change == "phases.main.final_lr on the command line"
    assert problem("phases.main.lr=3e-4").change == "phases.main.final_lr in example.yaml"


def test_an_unknown_key_that_a_run_wrote_is_perhaps_one_of_another_version(tmp_path: Path):
    text = config_to_yaml(load_config("quickstart")).replace("engine:", "engine:\n  new: 1", 1)
    path = written(tmp_path, text + "provenance: {starts: [{git_commit: 1bb77d8}]}\n")
    writer = "; or the smoltrain that wrote the file, git commit 1bb77d8"
    with pytest.raises(UserError) as refused:
        read_run_config(Path(path))
    with pytest.raises(UserError) as also_refused:
        load_config(path, ["run.sed=1"])
    assert [found.want.endswith(writer) for found in refused.value.problems] == [True]
    assert [found.want.endswith(writer) for found in also_refused.value.problems] == [False, True]
