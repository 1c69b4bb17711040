"""The sections and fields of a recipe: frozen, and their paths are such that a file system takes them."""

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from smoltrain.config.load import load_config
from smoltrain.config.schema import MAX_NAME_BYTES, MAX_PATH_BYTES, MAX_TOKENS, find_path_fault, parse_whole_number
from smoltrain.errors import UserError

EXAMPLE = str(Path(__file__).parents[1] / "example.yaml")
LONG_NAME = "x" * (MAX_NAME_BYTES + 1)


def test_a_config_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        load_config(EXAMPLE).run.seed = 1


@pytest.mark.parametrize("key", ["run.folder", "init.from", "engine.ds_config", "data.cache"])
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


# --- whole numbers as people write them


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *[("1e4", 10_000), ("1E+4", 10_000), ("2.5e3", 2500), ("5_000", 5000), ("1_0e2", 1000), ("+7", 7), ("7", 7)],
        *[("7.0", 7), ("-3", -3), ("1.5", None), ("1.5e0", None), ("1e-3", None), ("10k", None), ("", None)],
        *[("5__0", None), ("_5", None), ("0x10", None), ("1e999999999", None), ("e4", None), ("٣", 3)],
    ],
)
def test_a_text_that_spells_a_whole_number(text: str, number: int | None):
    assert parse_whole_number(text) == number


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("phases.main.steps=1e4", "phases.0.steps", 10_000),
        ("batch.micro_batch=1.2e1", "batch.micro_batch", 12),
        ("run.seed=1e18", "run.seed", 10**18),
        ("model.rope_theta=1e5", "model.rope_theta", 1e5),
        ("phases.main.lr=1_0e-4", "phases.0.lr", 1e-3),
        ("run.name=1e4", "run.name", "1e4"),
    ],
)
def test_a_number_as_people_write_it(override: str, path: str, value: object):
    found: Any = load_config(EXAMPLE, [override]).model_dump()
    for part in path.split("."):
        found = found[int(part) if part.isdecimal() else part]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("phases.main.steps=1.5", "saw '1.5', want a whole number; change"),
        ("phases.main.steps=10k", "saw '10k', want a whole number, as in 5_000 or 1e4; change"),
        ("phases.main.steps=1e10", "saw '1e10', want at most 2,147,483,647; change"),
        ("batch.micro_batch=2k", "saw '2k', want 'auto' or a whole number, as in 5_000 or 1e4; change"),
    ],
)
def test_what_is_no_whole_number(override: str, line: str):
    with pytest.raises(UserError, match=rf"^\S+ is not valid: {re.escape(line)} {override.partition('=')[0]}"):
        load_config(EXAMPLE, [override])


def test_a_file_may_write_numbers_so_too(tmp_path: Path):
    text = (
        Path(EXAMPLE).read_text(encoding="utf-8").replace("steps: 500", "steps: 1e3").replace("rows: 64", "rows: 1_0")
    )
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text, encoding="utf-8")
    loaded = load_config(str(recipe))
    assert (loaded.phases[0].steps, loaded.evaluate.rows) == (1000, 10)


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
        ("nan", "a number of tokens"),
        ("0.3", "a whole number of tokens"),
        ("1e999999999", "at most 1,000,000,000,000,000"),
        ("2000T", "less than or equal to"),
        ("0", "greater than 0"),
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
