"""Shards behind a server that fails in every way: each document arrives once and in order, or the run says why not."""

import gzip
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smoltrain.config.schema import DataSection
from smoltrain.data.documents import decompress, file_systems, reader_health, retry
from smoltrain.data.documents.reader_health import ReaderHealth
from smoltrain.data.documents.readers import read_records
from smoltrain.data.documents.records import Document, Record
from smoltrain.data.documents.retry import read_records_with_retry
from smoltrain.data.documents.shard import FileVersion, Shard
from smoltrain.errors import UserError
from tests.data.documents.files import list_shards
from tests.faulty_server import FaultyServer

TEXTS = [f"Document {i} ä says {random.Random(i).randbytes(150 + i % 200).hex()}." for i in range(400)]
MIXED = {"unavailable": 0.08, "cut": 0.08, "short": 0.08, "reset": 0.08, "stall": 0.03}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of many blocks, and waits that a test has time for."""
    monkeypatch.setattr(decompress, "BLOCK", 8000)
    monkeypatch.setattr(retry, "BLOCK", 8000)
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(retry, "LONGEST_WAIT_S", 0.01)
    monkeypatch.setattr(file_systems, "HTTP_STALL_S", 0.05)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("files")
    pq.write_table(pa.table({"n": range(len(TEXTS)), "text": TEXTS}), root / "a.parquet", row_group_size=60)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    (root / "a.jsonl").write_bytes(lines)
    (root / "a.jsonl.zst").write_bytes(pa.Codec("zstd").compress(lines, asbytes=True))
    (root / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (root / "a.txt").write_text("<|endoftext|>".join(TEXTS), encoding="utf-8")
    return {path.name: path.read_bytes() for path in root.iterdir()}


def section(url: str | Path, **more: object) -> DataSection:
    given = {"path": str(url), "patience_s": 20, "documents": "separator", **more}
    return DataSection.model_validate(given)


def listed(data: DataSection) -> Shard:
    (shard,) = list_shards(data)
    return shard


def told(data: DataSection, shard: Shard, health: ReaderHealth | None = None, **slice_: int) -> Iterator[Record]:
    return read_records_with_retry(shard, data, data=data, health=health or ReaderHealth(), **slice_)


def problem(do: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        do()
    (only,) = caught.value.problems
    assert "\n" not in str(only)
    return str(only)


def wait_for(what: Callable[[], bool]) -> None:
    limit = time.monotonic() + 10
    while not what():
        assert time.monotonic() < limit
        time.sleep(0.005)


# ---- what passes


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.zst", "a.jsonl.gz", "a.txt"])
@pytest.mark.parametrize(("first", "stride"), [(0, 1), (37, 5)])
def test_under_all_faults_every_document_comes_once_and_in_order(
    files: dict[str, bytes], tmp_path: Path, name: str, first: int, stride: int
):
    (tmp_path / name).write_bytes(files[name])
    local = section(tmp_path / name)
    expected = list(read_records(listed(local), local, first=first, stride=stride, max_document_mib=50))
    assert [record.text for record in expected if isinstance(record, Document)] == TEXTS[first::stride]
    with FaultyServer(files) as server:
        data, health = section(server.url(name)), ReaderHealth()
        shard, server.faults = listed(data), MIXED
        for seed in (1, 2):
            server._random.seed(seed)
            assert list(told(data, shard, health, first=first, stride=stride)) == expected
        assert sum(server.met.values()) >= 5
        assert len([asked for asked in server.asked if asked.startswith("GET")]) > len(files[name]) / 8000
    assert health.describe_wait() is None
    assert health.take_notes()


def test_the_faults_of_the_mix_all_happen(files: dict[str, bytes]):
    with FaultyServer(files) as server:
        data = section(server.url("a.jsonl"))
        shard, server.faults = listed(data), MIXED
        for _ in range(3):
            assert len(list(told(data, shard))) == len(TEXTS)
    assert set(server.met) == set(MIXED)


@pytest.mark.parametrize(
    ("name", "after"), [("a.parquet", 100), ("a.parquet", 0), ("a.jsonl.zst", 0), ("a.jsonl.gz", 0)]
)
def test_bytes_that_make_no_sense_are_asked_for_again_from_the_next_record_on(
    files: dict[str, bytes], name: str, after: int
):
    with FaultyServer(files) as server:
        data, health = section(server.url(name)), ReaderHealth()
        records = told(data, listed(data), health)
        begun = [next(records) for _ in range(after)]
        server.faults = {"garbled": 1.0}
        threading.Timer(0.2, server.faults.clear).start()
        assert [record.record for record in [*begun, *records]] == list(range(len(TEXTS)))
        assert server.met["garbled"]
    assert any("cannot be" in note for note in health.take_notes())


def test_many_threads_read_at_once(files: dict[str, bytes]):
    with FaultyServer(files, seed=3) as server:
        data, health = section(server.url("a.parquet")), ReaderHealth()
        shard, server.faults = listed(data), MIXED
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda first: list(told(data, shard, health, first=first, stride=8)), range(8)))
    assert [[record.record for record in part] for part in found] == [list(range(i, 400, 8)) for i in range(8)]


def test_patience_is_for_a_time_without_progress(files: dict[str, bytes]):
    with FaultyServer(files) as server:
        data = section(server.url("a.jsonl"), patience_s=0.18)
        shard = listed(data)
        server.faults = {"stall": 0.2}
        assert len(list(told(data, shard))) == len(TEXTS)
        assert server.met["stall"] * file_systems.HTTP_STALL_S > 0.2


# ---- what does not


def test_a_server_that_stays_silent_is_noticed_shown_and_given_up(files: dict[str, bytes]):
    with FaultyServer(files) as server, ThreadPoolExecutor(1) as pool:
        data, health = section(server.url("a.txt"), patience_s=0.6), ReaderHealth()
        shard, server.faults = listed(data), {"stall": 1.0}
        future = pool.submit(problem, lambda: list(told(data, shard, health)))
        wait_for(lambda: str(health.describe_wait()).startswith("a.txt: no answer within 0.05 s, for 0 s"))
        line = future.result(5)
        assert line.startswith("a shard cannot be read: saw no answer within 0.05 s, for 1 s, want an answer within")
        assert line.endswith(f"change data.patience_s, or {server.url('a.txt')}")
        assert health.describe_wait() is None
        assert health.take_notes() == [
            f"{server.url('a.txt')}: no answer within 0.05 s; it is tried again for up to 0.6 s"
        ]
        assert health.take_notes() == []


def test_a_question_that_its_own_client_keeps_asking_shows_too(
    files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(reader_health, "SILENCE_S", 0.05)
    monkeypatch.setattr(file_systems, "HTTP_STALL_S", 30.0)
    with FaultyServer(files) as server, ThreadPoolExecutor(1) as pool:
        data, health = section(server.url("a.txt")), ReaderHealth()
        shard, server.faults = listed(data), {"stall": 1.0}
        future = pool.submit(lambda: len(list(told(data, shard, health))))
        wait_for(lambda: health.describe_wait() == "a.txt: no answer, for 0 s")
        server.faults = {}
        server.released.set()
        assert future.result(10) == len(TEXTS)
        assert health.describe_wait() is None


def test_the_next_try_is_announced_and_stop_ends_the_wait(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 40.0)
    monkeypatch.setattr(retry, "LONGEST_WAIT_S", 60.0)
    with FaultyServer(files) as server, ThreadPoolExecutor(2) as pool:
        data, health = section(server.url("a.txt"), patience_s=3600), ReaderHealth()
        shard, server.faults = listed(data), {"unavailable": 1.0}
        other = Shard("other.txt", shard.url, shard.size, shard.version)
        futures = [pool.submit(problem, lambda s=s: list(told(data, s, health))) for s in (shard, other)]
        wait_for(lambda: str(health.describe_wait()).endswith("s (and 1 more)"))
        what, _, seconds = str(health.describe_wait()).removesuffix(" s (and 1 more)").rpartition(" ")
        assert what.endswith(".txt: HTTP 503, for 0 s, next try in")
        assert 15 < int(seconds) <= 40
        health.stop()
        assert all("saw HTTP 503" in future.result(5) for future in futures)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.zst", "a.txt"])
@pytest.mark.parametrize(
    ("status", "shown"),
    [
        (404, "a shard is gone: saw HTTP 404, want the file that was there when the data were listed"),
        (410, "a shard is gone: saw HTTP 410"),
        (401, "a shard is refused: saw HTTP 401"),
        (403, "a shard is refused: saw HTTP 403, want leave to read it"),
    ],
)
def test_what_lasts_ends_the_reading_at_once(files: dict[str, bytes], name: str, status: int, shown: str):
    with FaultyServer(dict(files), status=status) as server:
        data, health = section(server.url(name), patience_s=3600), ReaderHealth()
        records = told(data, listed(data), health)
        next(records)
        server.faults = {"unavailable": 1.0}
        line = problem(lambda: list(records))
        assert shown in line
        assert line.endswith(f"change {server.url(name)}")
        assert health.take_notes() == []


@pytest.mark.parametrize("status", [408, 429, 500])
def test_what_passes_does_not(files: dict[str, bytes], status: int):
    with FaultyServer(files, {"unavailable": 0.3}, seed=5, status=status) as server:
        server.faults, faulty = {}, server.faults
        data = section(server.url("a.jsonl"))
        shard, server.faults = listed(data), faulty
        assert len(list(told(data, shard))) == len(TEXTS)
        assert server.met["unavailable"]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.zst", "a.txt"])
@pytest.mark.parametrize("etags", [True, False])
def test_a_shard_that_becomes_another_one(files: dict[str, bytes], name: str, etags: bool):
    """Of the same size, it is known by its etag alone."""
    with FaultyServer(dict(files), etags=etags) as server:
        data = section(server.url(name), patience_s=3600)
        shard = listed(data)
        records = told(data, shard)
        begun = [next(records)]
        server.files[name] = bytes(len(files[name])) if etags else files[name][:-1]

        def read_on() -> None:
            begun.extend(records)

        line = problem(read_on)
        assert line.startswith(f"the shard changed while the run read it: saw {len(server.files[name])} bytes, ")
        assert f"want {shard.size} bytes, {shard.version}; change {server.url(name)}" in line
        assert [record.text for record in begun if isinstance(record, Document)] == TEXTS[: len(begun)]


def test_a_length_alone_does_not_make_it_another_one(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch):
    """A proxy may cut what it passes on; the etag is the shard's."""
    with FaultyServer(files) as server:
        data, health = section(server.url("a.txt")), ReaderHealth()
        shard = listed(data)
        wrong = iter([FileVersion(3, shard.version)] * 4)
        monkeypatch.setattr(retry, "stat_shard", lambda shard: next(wrong, FileVersion(shard.size, shard.version)))
        assert len(list(told(data, shard, health))) == len(TEXTS)
        assert "a length of 3 bytes instead of" in health.take_notes()[0]


def test_a_part_that_is_short_is_no_end(files: dict[str, bytes]):
    with FaultyServer(files) as server:
        data = section(server.url("a.jsonl"), patience_s=0.1)
        records = told(data, listed(data))
        next(records)
        server.faults = {"short": 1.0}
        assert "saw 4000 bytes instead of 8000, for 0 s, want" in problem(lambda: list(records))


def test_a_shard_that_is_broken_on_its_server_ends_with_its_place(files: dict[str, bytes]):
    with FaultyServer({"a.jsonl.gz": files["a.jsonl.gz"][:-20]}) as server:
        data = section(server.url("a.jsonl.gz"), patience_s=0.1)
        records = told(data, listed(data))
        found: list[Record] = []
        line = problem(lambda: found.extend(records))
        assert "the file cannot be decompressed" in line
        assert [record.record for record in found] == list(range(len(found)))
        assert len([asked for asked in server.asked if asked.endswith("bytes=0-7999")]) > 1


def test_a_server_that_went_away(files: dict[str, bytes]):
    with FaultyServer(files) as server:
        data = section(server.url("a.parquet"), patience_s=0.1)
        shard = listed(data)
    assert "a shard cannot be read" in problem(lambda: list(told(data, shard)))


def test_a_server_without_ranges(files: dict[str, bytes]):
    with FaultyServer({"a.txt": b"short", "b.txt": files["a.txt"]}, ranges=False) as server:
        data = section(server.url("a.txt"))
        assert len(list(told(data, listed(data)))) == 1
        data = section(server.url("b.txt"), patience_s=3600)
        shard = listed(data)
        assert "want a server that gives parts of a file" in problem(lambda: list(told(data, shard)))


def test_a_mistake_of_the_program_is_not_tried_again(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch):
    def mistake(shard: Shard) -> None:
        raise TypeError("a mistake")

    with FaultyServer(files) as server:
        data = section(server.url("a.txt"), patience_s=3600)
        shard = listed(data)
        monkeypatch.setattr(retry, "open_shard", mistake)
        with pytest.raises(TypeError, match="a mistake"):
            list(told(data, shard))


# ---- local files


def test_local_files_are_read_without_patience(tmp_path: Path):
    file = tmp_path / "a.txt"
    file.write_text("<|endoftext|>".join(TEXTS), encoding="utf-8")
    data = section(file)
    shard = listed(data)
    assert len(list(told(data, shard))) == len(TEXTS)
    records = told(data, shard)
    next(records)
    os.utime(file, ns=(1, 1))
    assert "the shard changed while the run read it" in problem(lambda: list(records))
    assert len(list(told(data, shard))) == len(TEXTS)  # another time alone is none of its business
    file.write_text("short")
    assert f"want {shard.size} bytes" in (line := problem(lambda: list(told(data, shard))))
    assert "saw 5 bytes" in line
    file.unlink()
    assert "a shard is gone: saw no such file" in problem(lambda: list(told(data, shard)))


def test_a_local_file_that_the_system_refuses_to_look_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.txt").write_text("hello")
    data = section(tmp_path / "a.txt")
    shard = listed(data)

    def refuse(shard: Shard) -> FileVersion:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(retry, "stat_shard", refuse)
    assert "the file cannot be read: saw [Errno 13] Permission denied" in problem(lambda: list(told(data, shard)))
