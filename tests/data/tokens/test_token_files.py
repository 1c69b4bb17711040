"""Ids in several files are one stream, and come out of it fast."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoltrain.data.documents.records import Document
from smoltrain.data.documents.shard import Shard
from smoltrain.data.tokens.token_files import MappedTokens, TokenWriter, content_hash, join_token_parts, pack_address
from smoltrain.errors import UserError

DOCUMENTS = st.lists(st.integers(1, 9), max_size=6)  # their lengths, in one part


def whole(sizes: list[int], dtype: type = np.uint16) -> tuple[MappedTokens, np.ndarray]:
    """A stream in parts of these sizes, one document each."""
    ids = np.arange(sum(sizes), dtype=dtype)
    parts = np.split(ids, np.cumsum(sizes)[:-1])
    starts = np.cumsum([0, *sizes[:-1]]).astype(np.uint64)
    return MappedTokens(parts, starts, starts + np.uint64(1000)), ids


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(1, 12), st.data())
def test_rows_are_those_of_the_joined_stream(sizes: list[int], length: int, draw: st.DataObject):
    found, ids = whole(sizes)
    assert len(found) == len(ids)
    if length > len(ids):
        assert found.read_rows(np.array([], np.int64), length).shape == (0, length)
        return
    offsets = draw.draw(st.lists(st.integers(0, len(ids) - length), max_size=9))
    rows = found.read_rows(np.array(offsets, np.int64), length)
    assert rows.dtype == np.uint16
    assert rows.tolist() == [ids[i : i + length].tolist() for i in offsets]


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(1, 12))
def test_views_are_the_stream_in_order(sizes: list[int], length: int):
    found, ids = whole(sizes)
    views = list(found.iterate_views(length))
    assert np.concatenate(views).tolist() == ids.tolist()
    assert max(map(len, views)) <= length


@pytest.mark.parametrize("offsets", [[-1], [0, 8], [np.iinfo(np.int64).max]])
@pytest.mark.parametrize("sizes", [[10], [4, 6]])
def test_no_row_beyond_the_ends(sizes: list[int], offsets: list[int]):
    """Windows are made without a look at the bounds, so a row past them would be anybody's memory."""
    found, _ = whole(sizes)
    with pytest.raises(AssertionError):
        found.read_rows(np.array(offsets), 3)


@settings(max_examples=50)
@given(parts=st.lists(DOCUMENTS, min_size=1, max_size=4).filter(lambda parts: any(map(sum, parts))), data=st.data())
def test_what_is_written_comes_back(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[int]], data: st.DataObject
):
    folder = tmp_path_factory.mktemp("tokens")
    dtype = data.draw(st.sampled_from([np.uint16, np.uint32]))
    cuts = iter([data.draw(st.integers(0, size)) for sizes in parts for size in sizes])
    ids, starts, made = [], [], []
    for number, sizes in enumerate(parts):
        writer = TokenWriter(folder, f"train-{number:05}")
        for size in sizes:
            starts.append(len(ids))
            writer.begin_document(2**64 - len(starts), len(starts) << 40 | len(starts) % 2)
            cut = next(cuts)
            new = [len(ids) + i for i in range(size)]
            writer.add_ids(np.array(new[:cut], dtype))
            writer.add_ids(np.array(new[cut:], dtype))
            ids += new
        made.append(writer.commit())
    about = join_token_parts(folder, "train", made, np.dtype(dtype))
    assert not list(folder.glob("*.partial"))
    names = [f"{number}.jsonl" for number in range(len(starts) + 1)]
    found = MappedTokens.open(folder, about, names)
    addresses = [f"{i}.jsonl:1" if i % 2 else f"{i}.jsonl" for i in range(1, len(starts) + 1)]
    assert [found.document_address(number) for number in range(len(starts))] == addresses
    assert found.dtype == dtype
    assert found.all().tolist() == ids
    assert found.starts.tolist() == starts
    assert found.hashes.tolist() == [2**64 - i for i in range(1, len(starts) + 1)]
    assert (about.tokens, about.documents) == (len(ids), len(starts))

    # a tail of it begins a document of its own, which is the one that was cut
    cut = data.draw(st.integers(1, len(ids)))
    if cut < len(ids):
        head = MappedTokens.open(folder, about.model_copy(update={"tokens": cut}))
        tail = MappedTokens.open(folder, about.model_copy(update={"first": cut, "tokens": len(ids) - cut}))
        assert head.all().tolist() + tail.all().tolist() == ids
        assert head.starts.tolist() == [start for start in starts if start < cut]
        assert tail.starts.tolist() == sorted({0, *(start - cut for start in starts if start >= cut)})
        assert len(head.hashes) == len(head.starts)
        assert tail.hashes[-1] == found.hashes[-1]
        assert len(tail.hashes) == len(tail.starts)
        last = sum(start <= cut for start in starts) - 1
        assert tail.hashes[0] == found.hashes[last]
        assert tail.addresses.tolist() == found.addresses[last:].tolist()
        assert head.addresses.tolist() == found.addresses[: len(head.starts)].tolist()


def test_a_file_of_another_size_is_refused(tmp_path: Path):
    writer = TokenWriter(tmp_path, "train-00000")
    writer.begin_document(1)
    writer.add_ids(np.arange(9, dtype=np.uint16))
    about = join_token_parts(tmp_path, "train", [writer.commit()], np.dtype(np.uint16))
    for name in about.files:
        raw = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(raw[:-1])
        with pytest.raises(UserError, match=f"{name} is damaged: saw {len(raw) - 1} bytes, want {len(raw)} bytes"):
            MappedTokens.open(tmp_path, about)
        (tmp_path / name).write_bytes(raw)
    (tmp_path / "train-00000.bin").unlink()
    with pytest.raises(UserError, match="is missing: saw no such file"):
        MappedTokens.open(tmp_path, about)


def test_an_address_is_a_record_or_all_of_a_shard():
    jsonl, text = Shard("a/b.jsonl", "", 1, ""), Shard("c:7.txt", "", 1, "")
    addresses = [
        pack_address(0, jsonl, Document("a/b.jsonl:1", 0, "")),
        pack_address(2**24 - 1, jsonl, Document(f"a/b.jsonl:{2**40 - 1}", 2**40 - 2, "")),
        pack_address(1, text, Document("c:7.txt", 0, "")),
    ]
    names = ["a/b.jsonl", "c:7.txt"] + ["x"] * (2**24 - 2)
    numbers = np.arange(3, dtype=np.uint64)
    tokens = MappedTokens([np.zeros(9, np.uint16)], numbers, numbers, np.array(addresses, np.uint64), names)
    assert [tokens.document_address(i) for i in range(3)] == ["a/b.jsonl:1", f"x:{2**40 - 1}", "c:7.txt"]
    assert tokens.document_address(3) == ""


def test_equal_texts_have_equal_hashes_and_others_do_not():
    texts = ["", "a", "b", "ab", "\u00e4", "a\u0308", "a" * 1000]
    assert len({content_hash(text) for text in texts}) == len(texts)
    assert content_hash("".join(["a", "b"])) == content_hash("ab")
    assert content_hash("") == 0x2D06800538D394C2  # of the published test vectors of XXH3


@pytest.mark.parametrize("num_ids", [10, 100_000])  # met when the buffer is written at the end, or before
def test_a_full_disk_is_told_with_the_file(tmp_path: Path, num_ids: int):
    def write() -> None:
        writer.add_ids(np.zeros(num_ids, np.uint16))
        writer.commit()

    writer = TokenWriter(tmp_path, "train-00000")
    writer._files[".bin"].discard()
    writer._files[".bin"]._file = Path("/dev/full").open("wb")  # noqa: SIM115 - the writer closes it
    with pytest.raises(OSError, match="No space left") as error:
        write()
    assert error.value.filename == str(tmp_path / "train-00000.bin")
    for file in writer._files.values():
        with contextlib.suppress(OSError):
            file.discard()
