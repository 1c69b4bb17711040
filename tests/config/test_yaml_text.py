"""What is typed on the command line arrives as it was typed, and YAML goes out and comes back as it was."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoltrain.config.load import load_config
from smoltrain.config.yaml_text import NULL_WORDS, apply_override, dump_yaml, parse_override_value, read_yaml
from smoltrain.errors import UserError
from tests import tiny

TYPED = [
    "/x/Disk #2", "exp #5", "#5", "/t/Moby Dick: or, The Whale.txt", "---", "...", "- a", "?", "*.txt", "&a b",
    "!important", "|", "> x", "%TAG", "@home", "`x`", "a: b", "http://h/p?q=null", "[SEP", "[SEP] #2", "'Disk' #2",
    '"Disk" and "Data"', "{a", " padded ", "off", "1e-3", "2024-01-01", "a=b=null", "nulls", "~x", "\\n", "C:\\data",
]  # fmt: skip


@pytest.mark.parametrize("text", TYPED)
def test_a_plain_value_is_the_text_that_was_typed(text: str) -> None:
    assert parse_override_value(text) == text
    known: dict[str, Any] = {}
    assert apply_override(known, f"data.path={text}") is None
    assert known == {"data": {"path": text}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None), ("~", None), ("null", None), ("NULL", None), ("''", ""), ('""', ""), ("'null'", "null"),
        ("[a, b]", ["a", "b"]), ("{a: 1}", {"a": "1"}), ('"a # b"', "a # b"), ('"a\\tb"', "a\tb"), ("[a] ", ["a"]),
    ],
)  # fmt: skip
def test_brackets_quotes_and_null_are_yaml(text: str, value: object) -> None:
    assert parse_override_value(text) == value


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_whatever_begins_plainly_is_itself(text: str) -> None:
    if text not in NULL_WORDS and not text.startswith(("[", "{", '"', "'")):
        assert parse_override_value(text) == text


def test_the_data_are_those_of_the_folder_that_was_named(tmp_path: Path) -> None:
    settings = tiny.load(tmp_path, f"data.path={tmp_path}/Disk #2")
    assert settings.data.path == f"{tmp_path}/Disk #2"
    with pytest.raises(UserError, match=r"run\.name is not valid: saw 'exp #5', want a plain name"):
        tiny.load(tmp_path, "run.name=exp #5")


def test_a_source_that_ends_like_null_takes_the_place_of_the_recipes() -> None:
    loaded = load_config("quickstart", ["data.path=http://host/part?version=null"])
    assert (loaded.data.package, loaded.data.path) == (None, "http://host/part?version=null")


@pytest.mark.parametrize("text", ["null", "~", ""])
def test_a_source_that_is_null_takes_nobodys_place(text: str) -> None:
    assert load_config("quickstart", [f"data.hub={text}"]) == load_config("quickstart")


@pytest.mark.parametrize(
    "words", ["=1", "a..b=1", ".a=1", "a.=1", ".=1", "phases.=1", "phases.main.=1", "phases..steps=1", "a", ""]
)
def test_an_override_with_an_empty_part_is_refused(words: str) -> None:
    before = {"phases": [{"name": "main"}]}
    problem = apply_override(before, words)
    assert problem is not None
    assert problem.what == "an override is not key=value"
    assert before == {"phases": [{"name": "main"}]}


@given(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\x85\u2028\u2029\r\n\ufeff\x0b\x1c#: '")))
def test_any_text_is_written_so_that_it_reads_back(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "exact.yaml"
    path.write_bytes(dump_yaml({"a": text, "b": [text]}).encode())
    assert read_yaml(path) == {"a": text, "b": [text]}
