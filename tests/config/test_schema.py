"""The sections and fields of a recipe: frozen, and their paths are such that a file system takes them."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from smoltrain.config.load import load_config
from smoltrain.config.schema import MAX_NAME_BYTES, MAX_PATH_BYTES, MAX_TOKENS, find_path_fault
from smoltrain.errors import UserError

EXAMPLE = str(Path(__file__).parents[1] / "example.yaml")
LONG_NAME = "x" * (MAX_NAME_BYTES + 1)


def test_a_config_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        load_config(EXAMPLE).run.seed = 1


@pytest.mark.parametrize("key", ["run.folder", "init.from", "engine.ds_config"])
def test_the_home_folder_is_meant_by_what_a_shell_leaves_of_it(monkeypatch: pytest.MonkeyPatch, key: str):
    monkeypatch.setenv("HOME", "/home/me")
    section, name = key.split(".")
    for text, meant in (("~/x", "/home/me/x"), ("~nobody-of-this-name/x", "~nobody-of-this-name/x"), ("a~/x", "a~/x")):
        found = load_config(EXAMPLE, [f"{key}={text}"])
        assert str(found.model_dump()[section][name]) == meant


@pytest.mark.parametrize("text", ["", "a/b", "/a", "x" * MAX_NAME_BYTES, "/".join(["x"] * (MAX_PATH_BYTES // 2))])
def test_a_path_that_a_file_system_takes(text: str):
    assert find_path_fault(text) is None


@pytest.mark.parametrize("text", ["a\0b", f"a/{LONG_NAME}", "é" * 101, "x/" * (MAX_PATH_BYTES // 2 + 1)])
def test_a_path_that_no_file_system_takes(text: str):
    assert find_path_fault(text)


PATHS = ("run.folder", "run.name", "init.from", "tokenizer.name", "data.package", "data.hub", "data.pattern")


@pytest.mark.parametrize("key", [*PATHS, "data.cache", "engine.ds_config", "phases.main.name"])
def test_each_field_that_becomes_a_path_is_checked(key: str):
    for value in (LONG_NAME, '"a\\0b"'):
        with pytest.raises(UserError, match=rf"{key.rpartition('.')[2]} is not valid"):
            load_config(EXAMPLE, [f"{key}={value}"])


@pytest.mark.parametrize("key", ["data.path", "data.validation_path"])
def test_a_url_may_have_a_long_name(key: str):
    assert load_config(EXAMPLE, ["data.package=null", "data.path=y", f"{key}=http://host/{'x' * 300}"])
    with pytest.raises(UserError, match=f"{key} is not valid"):
        load_config(EXAMPLE, [f'{key}="a\\0b"'])


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("3.2e9", 3_200_000_000), ("400M", 400_000_000), ("1.5B", 1_500_000_000), ("5_000_000", 5_000_000),
        ("400m", 400_000_000), ("0.25 T", 250_000_000_000), ("12K", 12_000), ("7", 7), ("1e15", MAX_TOKENS),
    ],
)  # fmt: skip
def test_tokens_are_counted_as_people_write_them(text: str, tokens: int):
    phase = load_config(EXAMPLE, [f"phases.main.tokens={text}"]).phases[0]
    assert phase.horizon == {"tokens": tokens}
    assert type(phase.tokens) is int


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("many", "a number of tokens, as in 5_000_000, 3.2e9, 400M or 1.5B"),
        ("400G", "a number of tokens"),
        ("M", "a number of tokens"),
        ("nan", "a number of tokens"),
        ("''", "a number of tokens"),
        ("0.3", "a whole number of tokens"),
        ("1.0001K", "a whole number of tokens"),
        ("1e999999999", "at most 1,000,000,000,000,000"),
        ("-1e999999999", "at most"),
        ("2000T", "less than or equal to"),
        ("0", "greater than 0"),
        ("-4M", "greater than 0"),
    ],
)
def test_what_is_no_count_of_tokens(text: str, want: str):
    with pytest.raises(UserError) as caught:
        load_config(EXAMPLE, [f"phases.main.tokens={text}"])
    (problem,) = caught.value.problems
    assert (problem.what, problem.change) == (
        "phases.main.tokens is not valid",
        "phases.main.tokens on the command line",
    )
    assert problem.want.startswith(want)


@pytest.mark.parametrize("key", ["steps=0", "steps=1.5", "epochs=0", "epochs=-1", "epochs=inf", "epochs=1e7"])
def test_a_length_is_a_number_above_zero(key: str):
    with pytest.raises(UserError, match=rf"phases.main.{key.partition('=')[0]} is not valid"):
        load_config(EXAMPLE, [f"phases.main.{key}"])
