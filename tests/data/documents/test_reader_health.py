"""What readers wait for, and what they leave for the console; test_retry.py has them behind a server that fails."""

from types import SimpleNamespace

import pytest

from smoltrain.data.documents import reader_health
from smoltrain.data.documents.reader_health import PendingWait, ReaderHealth


def test_the_same_fault_is_news_only_now_and_then(monkeypatch: pytest.MonkeyPatch):
    health = ReaderHealth()
    for what in ("HTTP 503", "HTTP 503", "reset"):
        health.report_failure(what, PendingWait("a", what, 0.0), what)
    assert health.take_notes() == ["HTTP 503", "reset"]
    monkeypatch.setattr(reader_health, "NOTE_EVERY_S", 0.0)
    health.report_failure("x", PendingWait("a", "reset", 0.0), "again")
    assert health.take_notes() == ["again"]


def test_a_note_of_a_kind_is_told_once():
    health = ReaderHealth()
    for kind, line in (("empty", "first"), ("empty", "second"), ("held out", "third")):
        health.add_note_once(kind, line)
    health.add_note("first")
    assert health.take_notes() == ["first", "third", "first"]


def test_the_longest_wait_is_described_with_how_many_more(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reader_health, "time", SimpleNamespace(monotonic=lambda: 1000.0))
    health = ReaderHealth()
    assert health.describe_wait() is None
    health.report_failure(1, PendingWait("a.txt", "HTTP 503", since=880.0, next_try=1030.0), "note")
    health.report_failure(2, PendingWait("b.txt", "reset", since=990.0, next_try=999.0), "note")
    assert health.describe_wait() == "a.txt: HTTP 503, for 120 s, next try in 30 s (and 1 more)"
    health.clear_wait(1)
    assert health.describe_wait() == "b.txt: reset, for 10 s, trying again"
    health.clear_wait(2)
    with health.track_request("c.txt"):
        assert health.describe_wait() is None, "it has only begun"
        monkeypatch.setattr(reader_health, "time", SimpleNamespace(monotonic=lambda: 1011.0))
        assert health.describe_wait() == "c.txt: no answer, for 11 s"
    assert health.describe_wait() is None
