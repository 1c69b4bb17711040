"""The bytes of a file as its readers want them: decompressed, and line by line without a line that is too long."""

import contextlib
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import BinaryIO

import zstandard

from smoltrain.data.documents.magic_bytes import ENCODING_HEAD_BYTES
from smoltrain.data.documents.records import BrokenFile, RawRecord
from smoltrain.data.documents.shard import Shard
from smoltrain.errors import Problem, exception_message

COMPRESSIONS = (".zst", ".gz")  # by the one that is read first, where a file lies there in both
BLOCK = 4 * 2**20  # bytes read at once
ZSTD_FRAGMENT_BYTES = 2**10  # bytes of a .zst that are decompressed at once: what comes out is at most 32 MiB
ZSTD_MAX_WINDOW = 2**31  # bytes that a .zst may look back: all that `zstd --long=31` can ask for


@contextlib.contextmanager
def open_decompressed(shard: Shard, file: BinaryIO, place: Callable[[], str]) -> Iterator[io.BufferedIOBase]:
    """The bytes of a file, decompressed if its suffix says so.

    Errors: BrokenFile, which blames the place that `place` gives then, if they make no sense.
    """
    raw = file if isinstance(file, io.BufferedReader) else io.BufferedReader(file, BLOCK)  # pyright: ignore[reportArgumentType]
    suffix = PurePosixPath(shard.name).suffix.lower()
    try:
        if suffix == ".gz":
            yield gzip.GzipFile(fileobj=raw)
        elif suffix == ".zst":
            yield io.BufferedReader(_ZstdReader(raw), 2**16)
        else:
            yield raw
    except (EOFError, zlib.error, zstandard.ZstdError, OSError) as error:
        if is_system_error(error):
            raise
        what, want = "the file cannot be decompressed", f"a whole {suffix} file"
        raise BrokenFile(Problem(what, exception_message(error), want, place())) from None


def is_system_error(error: Exception) -> bool:
    """Whether it is the system's refusal of a file: decompressors and pyarrow raise OSError for wrong bytes too."""
    return isinstance(error, OSError) and error.errno is not None


class _ZstdReader(io.RawIOBase):
    """What the frames of a .zst hold, one after another, each with a window as long as it asks for."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self._file = file
        self._zstd = zstandard.ZstdDecompressor(max_window_size=ZSTD_MAX_WINDOW)
        self._frame: zstandard.ZstdDecompressionObj | None = None  # the one that is being read
        self._compressed = b""  # read from the file, and not yet decompressed
        self._plain = b""  # decompressed, and handed out up to _offset
        self._offset = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Errors: zstandard.ZstdError; EOFError within a frame."""
        while self._offset == len(self._plain):
            self._compressed = self._compressed or self._file.read(ZSTD_FRAGMENT_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("it ends within a frame")
                return 0
            self._frame = self._frame or self._zstd.decompressobj()
            self._plain = self._frame.decompress(self._compressed)
            self._offset = 0
            self._compressed = self._frame.unused_data  # of the next frame, where this one has ended
            if self._frame.eof:
                self._frame = None
        chunk = self._plain[self._offset : self._offset + len(buffer)]
        buffer[: len(chunk)] = chunk
        self._offset += len(chunk)
        return len(chunk)


def read_bounded_lines(file: io.BufferedIOBase, limit: int) -> Iterator[RawRecord]:
    """Lines with their ends; None for one of more than `limit` bytes, which is read past and never held whole."""
    while line := file.readline(limit + 1):
        if len(line) <= limit or line.endswith(b"\n"):
            yield line
        else:
            while line and not line.endswith(b"\n"):
                line = file.readline(BLOCK)
            yield None


def peek_head(file: io.BufferedIOBase) -> bytes:
    """The next bytes, which remain to be read: ENCODING_HEAD_BYTES of them, or fewer."""
    return file.peek(ENCODING_HEAD_BYTES)[:ENCODING_HEAD_BYTES]  # pyright: ignore[reportAttributeAccessIssue]
