"""What is found out about a text: its amount, the vocabulary that it can teach, what is held out of it."""

import json
import math
from pathlib import Path

import pytest

from smoltrain.config.schema import DataSection
from smoltrain.data.documents.held_out import is_held_out
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.errors import UserError
from smoltrain.new_recipe import text as texts
from smoltrain.new_recipe.text import (
    FittedVocabulary,
    choose_validation_share,
    fit_vocabulary,
    largest_by_zipf,
    sample_text,
)
from tests.new_recipe.texts import write_texts

SEPARATOR = "<|endoftext|>"


def sample(path: Path) -> texts.TextSample:
    return sample_text(DataSection(path=str(path)))


def test_a_small_text_is_read_whole(tmp_path: Path):
    folder = write_texts(tmp_path / "texts")
    found = sample(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert found.is_whole
    assert (found.num_bytes, found.total_bytes, found.num_files, len(found.documents)) == (size, size, 20, 20)
    assert found == sample(folder), "equal files, equal answers"


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_the_amount_of_a_large_text_is_estimated_from_a_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
):
    monkeypatch.setattr(texts, "SAMPLE_BYTES", 60_000)
    monkeypatch.setattr(texts, "SHARD_BYTES", 15_000)
    whole = [path.read_text() for path in sorted(write_texts(tmp_path / "own", 30, 100).iterdir())]
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(10):
        records = [json.dumps({"id": 0, "text": f"{i} {text[:500]}"}) for text in whole for _ in range(10)]
        content = ("\n".join(whole) if suffix == "txt" else "\n".join(records)).encode()
        (folder / f"{i}.{suffix}").write_bytes(content)
    found = sample(folder)
    assert not found.is_whole
    assert found.num_bytes <= 60_000 + 15_500
    size = 10 * (len("\n".join(whole)) if suffix == "txt" else 300 * 502)
    assert found.total_bytes == pytest.approx(size, rel=0.02)


def test_where_the_separator_stands_it_parts_documents(tmp_path: Path):
    path = tmp_path / "stories.txt"
    path.write_text(f"once upon a time\n{SEPARATOR}\nand then\n{SEPARATOR}\nthe end\n")
    found = sample(path)
    assert found.parts_documents
    assert found.notes == (), "what is done already is no advice"
    assert [document.text for document in found.documents] == ["once upon a time", "and then", "the end"]


def test_a_separator_in_one_of_many_texts_is_prose(tmp_path: Path):
    folder = write_texts(tmp_path / "texts", 3)
    (folder / "about.txt").write_text(f"a separator is spelled {SEPARATOR}, as here\n")
    found = sample(folder)
    assert not found.parts_documents
    assert found.notes == (
        f"{SEPARATOR!r} stands in about.txt: data.documents=separator would cut the documents there",
    )


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "no file matches: saw nothing at"),
        ({"a.txt": "", "b.txt": ""}, "the data hold no text: saw none in 2 files, want at least one document"),
        ({"a.csv": "1,2"}, "no file to read at"),
    ],
)
def test_a_folder_without_text_is_refused(tmp_path: Path, files: dict[str, str], says: str):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        sample(tmp_path)
    assert says in str(error.value)
    assert str(error.value).endswith("change --data")


# --- the vocabulary


@pytest.mark.parametrize("num_tokens", [1e3, 1e5, 2e6, 1e9, 1e12])
def test_a_rare_id_stands_a_hundred_times_in_the_text(num_tokens: float):
    size = largest_by_zipf(num_tokens)
    assert num_tokens / (size * math.log(size)) >= 99
    assert num_tokens / ((size + 1) * math.log(size + 1)) <= 100


def test_no_more_ids_than_the_text_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(texts, "SEEN_PER_ID", 0.001)
    found = sample(write_texts(tmp_path / "texts", 3, 5))
    fitted = fit_vocabulary(found, 49152, SEPARATOR)
    given = Tokenizer.train_bpe((document.text for document in found.documents), 49152, SEPARATOR).num_ids
    assert 257 < fitted.size <= given < 514
    assert fitted.size == given
    assert fitted.reason == "all that the text gives"


def test_the_smallest_of_the_limits_counts(tmp_path: Path):
    found = sample(write_texts(tmp_path / "texts"))
    by_text = fit_vocabulary(found, 49152, SEPARATOR)
    assert (by_text.size, by_text.reason) == (257, "the text"), "its 30,000 tokens can teach no merge"
    many = texts.replace(found, total_bytes=1e12, is_whole=False)
    by_model = fit_vocabulary(many, 1000, SEPARATOR)
    assert (by_model.size, by_model.reason) == (960, "the model")
    assert by_model.text_tokens == pytest.approx(1e12 / by_model.bytes_per_token)
    texts_ids = Tokenizer.train_bpe((d.text for d in found.documents), 960, SEPARATOR)
    num_tokens = sum(len(texts_ids.encode(d.text)) + 1 for d in found.documents)
    assert by_model.bytes_per_token == pytest.approx(found.num_bytes / num_tokens)


# --- held out


def test_the_smallest_share_that_holds_out_enough(tmp_path: Path):
    found = sample(write_texts(tmp_path / "texts", 200, 3))
    vocabulary = FittedVocabulary(257, "the text", 1.0, float(found.num_bytes))
    for wanted in (0.01, 0.05, 0.15):
        share, tokens = choose_validation_share(found, vocabulary, wanted * found.num_bytes)
        assert tokens >= wanted * found.num_bytes
        smaller = [s for s in texts.SHARES if s < share]
        assert all(texts.count_held_out_tokens(found, vocabulary, s) < wanted * found.num_bytes for s in smaller)
    assert choose_validation_share(found, vocabulary, found.num_bytes)[0] == texts.SHARES[-1]


def test_what_is_held_out_is_what_a_run_holds_out(tmp_path: Path):
    found = sample(write_texts(tmp_path / "texts", 100, 3))
    vocabulary = FittedVocabulary(257, "the text", 2.0, found.num_bytes / 2)
    held_out = [document for document in found.documents if is_held_out(document.name, 0.1)]
    assert held_out
    expected = sum(len(document.text) for document in held_out) / 2
    assert texts.count_held_out_tokens(found, vocabulary, 0.1) == expected


def test_of_a_single_text_the_end_is_held_out(tmp_path: Path):
    (tmp_path / "one.txt").write_text("word " * 2000)
    found = sample(tmp_path)
    vocabulary = FittedVocabulary(257, "the text", 1.0, 10_000.0)
    assert choose_validation_share(found, vocabulary, 450) == (0.05, 500.0)
