"""Reading shards that lie behind a network: what passes is tried again, what does not pass ends the run with a message.

Bytes are asked for in blocks. After each block its server is asked whether the shard still has the size and version
that it was listed with, so no record out of another file is handed out, and a block that came back short is no end of
a file. A block that fails is asked for again, from where it began; so nothing is ever lost or read twice.

It is our own, where fsspec and the clients below it retry too: here one clock (data.patience_s) bounds what all of
them do, the console and the other ranks are told who waits for what, and a run that is stopped does not wait.
"""

import contextlib
import functools
import io
import random
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from smoltrain.config.schema import DataSection, SourceSection
from smoltrain.data.documents.decompress import BLOCK
from smoltrain.data.documents.file_systems import describe_read_error, http_status, is_missing_file
from smoltrain.data.documents.readers import read_records
from smoltrain.data.documents.records import BrokenFile, Record
from smoltrain.data.documents.shard import FileVersion, Shard, open_shard, report_unreadable, stat_shard
from smoltrain.errors import Problem, UserError

# Between tries: 1, 2, 4 ... 60 s, each less up to half of it at random, so that ranks do not ask in step.
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 60.0
SILENCE_S = 10.0  # from when on a request without an answer counts as waiting
NOTE_EVERY_S = 600.0  # at most one line in that time about the same fault of the same shard
RETRYABLE_STATUSES = (408, 425, 429)  # of HTTP's 4xx; any other one says that asking again is of no use
_PROGRAM_ERRORS = (TypeError, AttributeError, NameError, LookupError, AssertionError, ImportError)
_JITTER = random.Random()  # not the module's own, which belongs to the run


# ---- who waits


@dataclass
class _PendingWait:
    """A read that is blocked, or about to be tried again."""

    name: str  # of the shard
    what: str  # it waits for, or has failed with
    since: float  # these on time.monotonic
    next_try: float | None = None


class ReaderHealth:
    """Pending waits and notices of one rank's readers, which tell them from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waits: dict[object, _PendingWait] = {}
        self._noted_at: dict[tuple[str, str], float] = {}  # (shard or kind of note, fault) -> time.monotonic
        self._notes: list[str] = []
        self._stop = threading.Event()

    def describe_wait(self) -> str | None:
        """What a reader waits for right now, as "SHARD: HTTP 503, for 120 s, next try in 30 s"; None if none does."""
        now = time.monotonic()
        with self._lock:
            waits = [wait for wait in self._waits.values() if wait.next_try or now - wait.since >= SILENCE_S]
        if not waits:
            return None
        longest = min(waits, key=lambda wait: wait.since)
        line = f"{longest.name}: {longest.what}, for {now - longest.since:.0f} s"
        if longest.next_try is not None:
            seconds = longest.next_try - now
            line += f", next try in {seconds:.0f} s" if seconds > 0 else ", trying again"
        num_others = len({wait.name for wait in waits} - {longest.name})
        return line + (f" (and {num_others} more)" if num_others else "")

    def take_notes(self) -> list[str]:
        """Lines about new faults, each handed out once."""
        with self._lock:
            notes = self._notes
            self._notes = []
        return notes

    def add_note(self, line: str) -> None:
        """A line to be handed out with the others."""
        with self._lock:
            self._notes.append(line)

    def add_note_once(self, kind: str, line: str) -> None:
        """A line to be handed out, unless one of its kind was."""
        with self._lock:
            self._add_note_if_due((kind, ""), line, every_s=float("inf"))

    def stop(self) -> None:
        """No reader waits any longer: those that do, and those that would, raise their UserError."""
        self._stop.set()

    @contextlib.contextmanager
    def track_request(self, name: str) -> Iterator[None]:
        """Around a request to a server, which may be silent."""
        key = object()
        with self._lock:
            self._waits[key] = _PendingWait(name, "no answer", time.monotonic())
        try:
            yield
        finally:
            self.clear_wait(key)

    def report_failure(self, key: object, wait: _PendingWait, note: str) -> None:
        """`key` waits; `note` says so, unless the same was said of the same shard not long ago."""
        with self._lock:
            self._waits[key] = wait
            self._add_note_if_due((wait.name, wait.what), note, every_s=NOTE_EVERY_S)

    def clear_wait(self, key: object) -> None:
        """`key` waits no more."""
        with self._lock:
            self._waits.pop(key, None)

    def sleep_unless_stopped(self, seconds: float) -> bool:
        """Whether that time went by without `stop`."""
        return not self._stop.wait(seconds)

    def _add_note_if_due(self, subject: tuple[str, str], line: str, every_s: float) -> None:
        """At most one line about a subject in that time. The lock is held."""
        now = time.monotonic()
        if subject not in self._noted_at or now - self._noted_at[subject] >= every_s:
            self._noted_at[subject] = now
            self._notes.append(line)


class _Backoff:
    """Exponential backoff of one shard's reads, with a deadline of `patience_s` without progress."""

    def __init__(self, shard: Shard, patience_s: float, health: ReaderHealth) -> None:
        self._shard, self._patience_s, self._health = shard, patience_s, health
        self._failing_since: float | None = None
        self._wait_s = FIRST_WAIT_S

    def reset(self) -> None:
        """There is progress."""
        if self._failing_since is not None:
            self._health.clear_wait(self)
            self._failing_since = None
            self._wait_s = FIRST_WAIT_S

    def wait_or_raise(self, error: Exception, began: float) -> None:
        """Wait for the next try; the one that failed began at that time. Errors: UserError if there is to be none."""
        if isinstance(error, BrokenFile):
            what = error.problems[0].what
        else:
            _raise_if_permanent(error, self._shard)
            what = describe_read_error(error)
        if self._failing_since is None:
            self._failing_since = began
        now = time.monotonic()
        left_s = self._failing_since + self._patience_s - now
        pause_s = min(self._wait_s * _JITTER.uniform(0.5, 1), max(left_s, 0))
        wait = _PendingWait(self._shard.name, what, self._failing_since, next_try=now + pause_s)
        note = f"{self._shard.place}: {what}; it is tried again for up to {self._patience_s:g} s"
        self._health.report_failure(self, wait, note)
        if left_s <= 0 or not self._health.sleep_unless_stopped(pause_s):
            self._health.clear_wait(self)
            raise self._patience_error(error, what, now - self._failing_since)
        self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)

    def _patience_error(self, error: Exception, what: str, after_s: float) -> UserError:
        if isinstance(error, BrokenFile):
            return error
        want = f"an answer within data.patience_s = {self._patience_s:g} (the same command then goes on from here)"
        change = f"data.patience_s, or {self._shard.place}"
        return UserError(Problem("a shard cannot be read", f"{what}, for {after_s:.0f} s", want, change))


# ---- records


def read_records_with_retry(
    shard: Shard, source: SourceSection, *, first: int = 0, stride: int = 1, data: DataSection, health: ReaderHealth
) -> Generator[Record]:
    """As `read_records`; what a network does to a shard is tried again for up to data.patience_s without progress.

    Errors: UserError as read_records'; if patience ends; at once if the shard is gone, forbidden or no longer the one
    that was listed.
    """
    read = functools.partial(read_records, shard, source, stride=stride, max_document_mib=data.max_document_mib)
    if shard.is_local:
        with _check_unchanged(shard):
            yield from read(first=first)
        return

    def open_remote(shard: Shard) -> BinaryIO:
        transport = _Backoff(shard, data.patience_s, health)  # for bytes that do not arrive
        return io.BufferedReader(_RemoteFile(shard, transport, health), BLOCK)

    content = _Backoff(shard, data.patience_s, health)  # for bytes that arrive, and make no sense
    while True:
        records = read(first=first, opener=open_remote)
        try:
            for record in records:
                first = record.record + stride
                content.reset()
                yield record
            content.reset()
            return
        except BrokenFile as error:  # bytes that were garbled on the way, unless it happens each time
            content.wait_or_raise(error, time.monotonic())
        finally:
            records.close()


@contextlib.contextmanager
def _check_unchanged(shard: Shard) -> Iterator[None]:
    """Errors: UserError if a local file is not of the listed size, changes meanwhile, or cannot be read."""
    with report_unreadable(shard):
        try:
            before = stat_shard(shard)
            if before.size != shard.size:  # another time alone is that of a copy
                raise _shard_changed_error(shard, FileVersion(before.size, shard.version))
            yield
            after = stat_shard(shard)
            if after != before:
                raise _shard_changed_error(shard, after)
        except FileNotFoundError:
            raise _shard_gone_error(shard, "no such file") from None


# ---- bytes


class _RemoteFile(io.RawIOBase):
    """The bytes of a shard, each of them verified to be the listed shard's. Errors: UserError alone."""

    def __init__(self, shard: Shard, backoff: _Backoff, health: ReaderHealth) -> None:
        assert shard.size is not None
        self._shard, self._backoff, self._health = shard, backoff, health
        self._size = shard.size
        self._file: BinaryIO | None = None
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = origin + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self.read(BLOCK), b""))

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """All that was asked for, unless the file ends before."""
        begin = self._position
        end = min(begin + len(buffer), self._size)
        while self._position < end:
            raw = self._read_block(min(BLOCK, end - self._position))
            offset = self._position - begin
            buffer[offset : offset + len(raw)] = raw
            self._position += len(raw)
        return self._position - begin

    def _read_block(self, size: int) -> bytes:
        """The next `size` bytes, asked for until they come."""
        while True:
            began = time.monotonic()
            try:
                with self._health.track_request(self._shard.name):
                    raw = self._request_bytes(size)
                self._backoff.reset()
                return raw
            except Exception as error:  # of a server, its client, the system: there is no common base
                self._file = None
                self._backoff.wait_or_raise(error, began)

    def _request_bytes(self, size: int) -> bytes:
        if self._file is None:
            self._file = open_shard(self._shard)
        self._file.seek(self._position)
        raw = self._file.read(size)
        self._check_version()
        if len(raw) != size:
            raise OSError(f"{len(raw)} bytes instead of {size}")
        return raw

    def _check_version(self) -> None:
        """Errors: UserError if the shard is another one now; OSError if only its server says a wrong length."""
        now = stat_shard(self._shard)
        if now == (self._size, self._shard.version):
            return
        # A proxy can be wrong about a length, but not about an etag.
        if now.version == self._shard.version and now.version.startswith("etag "):
            raise OSError(f"a length of {now.size} bytes instead of {self._size}")
        raise _shard_changed_error(self._shard, now)


def _raise_if_permanent(error: Exception, shard: Shard) -> None:
    """Errors: UserError if asking again is of no use; the error itself if it is a mistake of this program."""
    if isinstance(error, (UserError, *_PROGRAM_ERRORS)):
        raise error
    saw = describe_read_error(error)
    if is_missing_file(error):
        raise _shard_gone_error(shard, saw) from None
    status = http_status(error)
    if status is None:
        is_refused = isinstance(error, PermissionError)
    else:
        is_refused = 400 <= status < 500 and status not in RETRYABLE_STATUSES
    if is_refused:
        want = "leave to read it (with the credentials of this machine)"
        raise UserError(Problem("a shard is refused", saw, want, shard.place)) from None
    if type(error) is ValueError:  # so fsspec says that the server sent all of a file instead of a part
        want = "a server that gives parts of a file (Range), or a copy on a disk"
        raise UserError(Problem("a shard cannot be read in parts", saw, want, shard.place)) from None


def _shard_gone_error(shard: Shard, saw: str) -> UserError:
    return UserError(Problem("a shard is gone", saw, "the file that was there when the data were listed", shard.place))


def _shard_changed_error(shard: Shard, now: FileVersion) -> UserError:
    what = "the shard changed while the run read it"
    want = f"{shard.size} bytes, {shard.version}"
    return UserError(Problem(what, f"{now.size} bytes, {now.version}", want, shard.place))
