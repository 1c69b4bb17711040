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
import time
from collections.abc import Generator, Iterator
from typing import BinaryIO

from smoltrain.config.schema import DataSection, SourceSection
from smoltrain.data.documents.decompress import BLOCK
from smoltrain.data.documents.file_systems import describe_read_error, http_status, is_missing_file
from smoltrain.data.documents.reader_health import PendingWait, ReaderHealth
from smoltrain.data.documents.readers import read_records
from smoltrain.data.documents.records import BrokenFile, Record
from smoltrain.data.documents.shard import FileVersion, Shard, open_shard, report_unreadable, stat_shard
from smoltrain.errors import Problem, UserError

# Between tries: 1, 2, 4 ... 60 s, each less up to half of it at random, so that ranks do not ask in step.
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 60.0
RETRYABLE_STATUSES = (408, 425, 429)  # of HTTP's 4xx; any other one says that asking again is of no use
_PROGRAM_ERRORS = (TypeError, AttributeError, NameError, LookupError, AssertionError, ImportError)
_JITTER = random.Random()  # not the module's own, which belongs to the run


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
        wait = PendingWait(self._shard.name, what, self._failing_since, next_try=now + pause_s)
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

    opener = functools.partial(open_with_retry, data=data, health=health)
    content = _Backoff(shard, data.patience_s, health)  # for bytes that arrive, and make no sense
    while True:
        records = read(first=first, opener=opener)
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


def open_with_retry(shard: Shard, data: DataSection, health: ReaderHealth) -> BinaryIO:
    """As `open_shard`; bytes that do not arrive over a network are asked for again, for up to data.patience_s."""
    if shard.is_local:
        return open_shard(shard)
    backoff = _Backoff(shard, data.patience_s, health)
    return io.BufferedReader(_RemoteFile(shard, backoff, health), BLOCK)


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
