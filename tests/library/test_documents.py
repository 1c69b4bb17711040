"""Documents of a program: written once, the same at every start, whatever is in them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from smoltrain.errors import UserError
from smoltrain.library.documents import DOCUMENTS_FILE, write_documents
from tests.library.conftest import load_tiny

STRANGE = ["plain", "two\nlines \u2028 and a NUL \0", "\ud800 is half a character", ""]


def test_texts_are_written_as_they_are_and_become_the_data(tmp_path: Path) -> None:
    config = load_tiny(tmp_path, "a", data={"validation_share": 0.25, "text_field": "body", "hub_split": "x"})
    own = write_documents(config, iter(STRANGE))
    path = tmp_path / "a" / DOCUMENTS_FILE
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == STRANGE
    assert (own.data.path, own.data.package, own.data.text_field) == (str(path), None, "text")
    assert own.data.validation_share == 0.25, "what is done with documents stays"
    assert own.model_copy(update={"data": config.data}) == config
    modified = path.stat().st_mtime_ns
    assert write_documents(config, STRANGE) == own
    assert path.stat().st_mtime_ns == modified


def test_the_column_of_a_table_is_texts_and_the_table_is_names(tmp_path: Path) -> None:
    import pandas  # which datasets and gradio bring

    table = pandas.DataFrame({"text": ["one", "two"], "url": ["", ""]})
    with pytest.raises(UserError, match="documents gives names, not texts: saw DataFrame with text, url"):
        write_documents(load_tiny(tmp_path, "a"), table)
    assert not (tmp_path / "a").exists()
    own = write_documents(load_tiny(tmp_path, "a"), table["text"])
    assert Path(str(own.data.path)).read_text(encoding="utf-8") == '{"text": "one"}\n{"text": "two"}\n'


def fail() -> Iterator[str]:
    yield "first"
    raise RuntimeError("of the program")


@pytest.mark.parametrize(
    ("documents", "error", "said"),
    [
        ([], UserError, "there are no documents"),
        ("one text", UserError, "documents is one text"),
        ({"text": ["a", "b"]}, UserError, "documents gives names, not texts: saw dict with text"),
        (Path("texts"), UserError, "documents cannot be iterated: saw PosixPath"),
        (["a", 3], UserError, "document 2 is no text: saw int 3"),
        (["a", b"b"], UserError, "document 2 is no text: saw bytes b'b'"),
        (["b", "a"], UserError, "the documents are not those of the run: saw other texts"),
        (fail(), RuntimeError, "of the program"),
    ],
)
def test_what_cannot_be_the_documents_leaves_the_file_as_it_was(
    tmp_path: Path, documents: Any, error: type[Exception], said: str
) -> None:
    config = load_tiny(tmp_path, "a")
    write_documents(config, ["a", "b"])
    before = (tmp_path / "a" / DOCUMENTS_FILE).read_bytes()
    with pytest.raises(error, match=said):
        write_documents(config, documents)
    assert (tmp_path / "a" / DOCUMENTS_FILE).read_bytes() == before
    assert [path.name for path in (tmp_path / "a").iterdir()] == [DOCUMENTS_FILE]


def test_documents_that_a_mix_does_not_name_are_refused(tmp_path: Path) -> None:
    sources = [{"name": "one", "weight": 1, "path": "a"}, {"name": "two", "weight": 1, "path": "b"}]
    config = load_tiny(
        tmp_path,
        "a",
        data={"package": None, "pattern": "**/*", "sources": sources},
        phases={"main": {"mix": {"one": 1}}},
    )
    with pytest.raises(UserError, match="mix"):
        write_documents(config, ["a"])
    assert not (tmp_path / "a").exists()
