"""File systems behind URLs that lack a package, or do not answer."""

import asyncio
import sys

import pytest

from smoltrain.data.documents import file_systems
from smoltrain.data.documents.file_systems import HTTP_STALL_S, is_missing_file
from tests.data.documents.files import at, problem
from tests.faulty_server import FaultyServer


@pytest.mark.parametrize(("protocol", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("gcs", "gcsfs")])
def test_a_protocol_names_the_package_that_it_needs(monkeypatch: pytest.MonkeyPatch, protocol: str, package: str):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    line = problem(at(f"{protocol}://bucket/a.txt"), key="data.sources.web")
    assert f"{protocol}:// cannot be read: saw " in line
    assert line.endswith(f"want `pip install {package}`; change data.sources.web.path")
    assert "want a protocol of fsspec" in problem(at("nosuch://bucket/a.txt"))


def test_over_http_a_silent_server_is_noticed(monkeypatch: pytest.MonkeyPatch):
    assert HTTP_STALL_S <= 30
    monkeypatch.setattr(file_systems, "HTTP_STALL_S", 0.05)
    with FaultyServer({"a.txt": b"hello"}, {"stall": 1.0}) as server:
        assert "saw no answer within 0.05 s" in problem(at(server.url("a.txt")))


def test_a_file_is_not_missing_where_nobody_answered():
    """As aiohttp chains them when its time is up: a cancellation is behind the timeout."""
    late = TimeoutError()
    late.__cause__ = asyncio.CancelledError()
    gone = FileNotFoundError("http://host/a.txt")
    assert is_missing_file(gone)
    gone.__cause__ = late
    assert not is_missing_file(gone)
