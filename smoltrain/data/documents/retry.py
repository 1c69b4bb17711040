"""Reading shards that lie behind a network: what passes is tried again, what does not pass ends the run with a message.

Bytes are asked for in blocks. After each block its server is asked whether the shard still has the size and version
that it was listed with, so no record out of another file is handed out, and a block that came back short is no end of
a file. A block that fails is asked for again, from where it began; so nothing is ever lost or read twice.
"""

import contextlib
import io
import random
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from smoltrain.config.schema import DataSection, SourceSection
from smoltrain.data.documents.readers import BLOCK, BrokenFile, Record, read_records
from smoltrain.data.documents.shard import (
    Shard,
    describe_read_error,
    http_status,
    is_missing_file,
    open_shard,
    stat_shard,
)
from smoltrain.errors import Problem, UserError

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0  # between tries: 1, 2, 4 ... 60 s, each less up to half of it at random
SILENCE_S = 10.0  # from when on a question without an answer counts as waiting
NOTE_EVERY_S = 600.0  # at most one line in that time about the same fault of the same shard
RETRYABLE_STATUSES = (408, 425, 429)  # of HTTP's 4xx; any other one says that asking again is of no use
_PROGRAM_ERRORS = (TypeError, AttributeError, NameError, LookupError, AssertionError, ImportError)
_JITTER = random.Random()  # not the module's own, which belongs to the run


@dataclass
class _PendingWait:
    """Something that does not go on."""

    name: str  # of the shard
    what: str
    since: float  # these on time.monotonic
    next_try: float | None = None


class ReaderHealth:
    """What the readers of one rank have met; they tell it from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waits: dict[object, _PendingWait] = {}
        self._noted: dict[tuple[str, str], float] = {}
        self._notes: list[str] = []
        self._stop = threading.Event()

    def describe_wait(self) -> str:
        """What a reader waits for right now, as "SHARD: HTTP 503, for 120 s, next try in 30 s"; '' if none does."""
        now = time.monotonic()
        with self._lock:
            waits = [wait for wait in self._waits.values() if wait.next_try or now - wait.since >= SILENCE_S]
        if not waits:
            return ""
        wait = min(waits, key=lambda wait: wait.since)
        line = f"{wait.name}: {wait.what}, for {now - wait.since:.0f} s"
        if wait.next_try is not None:
            line += f", next try in {wait.next_try - now:.0f} s" if wait.next_try > now else ", trying again"
        more = len({wait.name for wait in waits} - {wait.name})
        return line + (f" (and {more} more)" if more else "")

    def take_notes(self) -> list[str]:
        """Lines about new faults, each handed out once."""
        with self._lock:
            notes, self._notes = self._notes, []
        return notes

    def note(self, line: str) -> None:
        """A line to be handed out with the others."""
        with self._lock:
            self._notes.append(line)

    def add_note_once(self, kind: str, line: str) -> None:
        """A line to be handed out, unless one of its kind was."""
        with self._lock:
            if (kind, "") not in self._noted:
                self._noted[kind, ""] = time.monotonic()
                self._notes.append(line)

    def stop(self) -> None:
        """No reader waits any longer: those that do, and those that would, raise their UserError."""
        self._stop.set()

    @contextlib.contextmanager
    def track_request(self, name: str) -> Iterator[None]:
        """Around a question to a server, which may be silent."""
        key = object()
        with self._lock:
            self._waits[key] = _PendingWait(name, "no answer", time.monotonic())
        try:
            yield
        finally:
            self.clear_wait(key)

    def failed(self, key: object, wait: _PendingWait, note: str) -> None:
        """`key` waits, and says so in one line if that is news."""
        now, about = time.monotonic(), (wait.name, wait.what)
        with self._lock:
            self._waits[key] = wait
            if now - self._noted.get(about, -NOTE_EVERY_S) >= NOTE_EVERY_S:
                self._noted[about] = now
                self._notes.append(note)

    def clear_wait(self, key: object) -> None:
        """`key` waits no more."""
        with self._lock:
            self._waits.pop(key, None)

    def sleep_unless_stopped(self, seconds: float) -> bool:
        """Whether that time went by without `stop`."""
        return not self._stop.wait(seconds)


def read_records_with_retry(
    shard: Shard, source: SourceSection, *, first: int = 0, stride: int = 1, data: DataSection, health: ReaderHealth
) -> Generator[Record]:
    """As readers.read, but what a network does to a shard is tried again for up to data.patience_s without progress.

    Errors: UserError as read's; if patience ends; at once if the shard is gone, forbidden or no longer the one listed.
    """
    if shard.is_local:
        with _check_unchanged(shard):
            yield from read_records(shard, source, first=first, stride=stride, max_document_mib=data.max_document_mib)
        return
    content = _Backoff(shard, data.patience_s, health)
    while True:
        transport = _Backoff(shard, data.patience_s, health)
        records = read_records(
            shard, source, first=first, stride=stride, max_document_mib=data.max_document_mib,
            opener=lambda shard, tries=transport: io.BufferedReader(_RemoteFile(shard, tries, health), BLOCK),
        )  # fmt: skip
        try:
            for record in records:
                first = record.record + stride
                content.reset()
                yield record
            content.reset()
            return
        except BrokenFile as error:  # bytes that lost their way, unless it happens each time
            content.failed(error, time.monotonic())
        finally:
            records.close()


@contextlib.contextmanager
def _check_unchanged(shard: Shard) -> Iterator[None]:
    """Errors: UserError if a local file is not of the listed size, or changes meanwhile."""
    try:
        before = stat_shard(shard)
        if before[0] != shard.size:
            raise _shard_changed_error(shard, (before[0], shard.version))
        yield
        if (after := stat_shard(shard)) != before:
            raise _shard_changed_error(shard, after)
    except FileNotFoundError:
        raise _shard_gone_error(shard, "no such file") from None


class _Backoff:
    """How long something has failed in a row, and the wait before it is tried again."""

    def __init__(self, shard: Shard, patience_s: float, health: ReaderHealth) -> None:
        self._shard, self._patience_s, self._health = shard, patience_s, health
        self._since: float | None = None
        self._wait_s = FIRST_WAIT_S

    def reset(self) -> None:
        """There is progress."""
        if self._since is not None:
            self._health.clear_wait(self)
            self._since, self._wait_s = None, FIRST_WAIT_S

    def failed(self, error: Exception, began: float) -> None:
        """Wait for the next try; the last one began at that time. Errors: UserError if there is to be none."""
        if not isinstance(error, BrokenFile):
            _raise_if_permanent(error, self._shard)
        self._since = began if self._since is None else self._since
        what = error.problems[0].what if isinstance(error, BrokenFile) else describe_read_error(error)
        now = time.monotonic()
        left = self._since + self._patience_s - now
        pause = min(self._wait_s * _JITTER.uniform(0.5, 1), max(left, 0))
        note = f"{self._shard.place}: {what}; it is tried again for up to {self._patience_s:g} s"
        self._health.failed(self, _PendingWait(self._shard.name, what, self._since, now + pause), note)
        if left <= 0 or not self._health.sleep_unless_stopped(pause):
            self._health.clear_wait(self)
            raise self._patience_error(error, what, now - self._since)
        self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)

    def _patience_error(self, error: Exception, what: str, after_s: float) -> UserError:
        if isinstance(error, BrokenFile):
            return error
        want = f"an answer within data.patience_s = {self._patience_s:g} (the same command then goes on from here)"
        change = f"data.patience_s, or {self._shard.place}"
        return UserError(Problem("a shard cannot be read", f"{what}, for {after_s:.0f} s", want, change))


class _RemoteFile(io.RawIOBase):
    """The bytes of a shard, each of them verified to be the listed shard's. Errors: UserError alone."""

    def __init__(self, shard: Shard, tries: _Backoff, health: ReaderHealth) -> None:
        assert shard.size is not None
        self._shard, self._size, self._tries, self._health = shard, shard.size, tries, health
        self._file: BinaryIO | None = None
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self.read(BLOCK), b""))

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """All that was asked for, unless the file ends before."""
        begin, end = self._at, min(self._at + len(buffer), self._size)
        while self._at < end:
            raw = self._block(min(BLOCK, end - self._at))
            buffer[self._at - begin : self._at - begin + len(raw)] = raw
            self._at += len(raw)
        return self._at - begin

    def _block(self, size: int) -> bytes:
        while True:
            began = time.monotonic()
            try:
                with self._health.track_request(self._shard.name):
                    raw = self._asked(size)
                self._tries.reset()
                return raw
            except Exception as error:  # of a server, its client, the system: there is no common base
                self._file = None
                self._tries.failed(error, began)

    def _asked(self, size: int) -> bytes:
        if self._file is None:
            self._file = open_shard(self._shard)
        self._file.seek(self._at)
        raw = self._file.read(size)
        self._verify()
        if len(raw) != size:
            raise OSError(f"{len(raw)} bytes instead of {size}")
        return raw

    def _verify(self) -> None:
        """Errors: UserError if the shard is another one now; a server can be wrong about a length, but not an etag."""
        listed, now = (self._size, self._shard.version), stat_shard(self._shard)
        if now == listed:
            return
        if now[1] == listed[1] and now[1].startswith("etag "):
            raise OSError(f"a length of {now[0]} bytes instead of {self._size}")
        raise _shard_changed_error(self._shard, now)


def _raise_if_permanent(error: Exception, shard: Shard) -> None:
    """Errors: UserError if asking again is of no use; the error itself if it is a mistake of this program."""
    if isinstance(error, (UserError, *_PROGRAM_ERRORS)):
        raise error
    status = http_status(error)
    if is_missing_file(error):
        raise _shard_gone_error(shard, describe_read_error(error)) from None
    refused = status is None and isinstance(error, PermissionError)
    if refused or (status is not None and 400 <= status < 500 and status not in RETRYABLE_STATUSES):
        want = "leave to read it (with the credentials of this machine)"
        raise UserError(Problem("a shard is refused", describe_read_error(error), want, shard.place)) from None
    if type(error) is ValueError:
        want = "a server that gives parts of a file (Range), or a copy on a disk"
        raise UserError(
            Problem("a shard cannot be read in parts", describe_read_error(error), want, shard.place)
        ) from None


def _shard_gone_error(shard: Shard, saw: str) -> UserError:
    return UserError(Problem("a shard is gone", saw, "the file that was there when the data were listed", shard.place))


def _shard_changed_error(shard: Shard, now: tuple[int | None, str]) -> UserError:
    want = f"{shard.size} bytes, {shard.version}"
    what = "the shard changed while the run read it"
    return UserError(Problem(what, f"{now[0]} bytes, {now[1]}", want, shard.place))
