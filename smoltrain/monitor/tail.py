"""Records of a run read from their end, however long they are: a run of 100,000 steps has 100 MB of metrics.jsonl."""

from pathlib import Path
from typing import Any

from smoltrain import files

CHUNK_BYTES = 2**20


def read_tail(path: Path, max_bytes: int) -> bytes:
    """The whole lines among the last bytes of a file; b"" if there is no such file. Errors: OSError."""
    try:
        size = files.stat_regular_file(path).st_size
    except FileNotFoundError:
        return b""
    return read_piece(path, max(0, size - max_bytes), size)


def read_piece(path: Path, start: int, end: int) -> bytes:
    """The whole lines between two places of a file. Errors: OSError."""
    content = read_from_line(path, start, end)
    return content[: content.rfind(b"\n") + 1]


def read_from_line(path: Path, start: int, end: int) -> bytes:
    """What lies between two places of a file, from the first line on that begins there. Errors: OSError."""
    before = max(0, start - 1)  # a line that begins at `start` has the end of another one before it
    with path.open("rb") as file:
        file.seek(before)
        content = file.read(end - before)
    return content.partition(b"\n")[2] if start > 0 else content


def find_last_line(path: Path, mark: bytes, max_bytes: int) -> dict[str, Any] | None:
    """The last sound line of a .jsonl that has these bytes in it, of those among its last bytes. Errors: OSError."""
    try:
        end = files.stat_regular_file(path).st_size
    except FileNotFoundError:
        return None
    oldest = max(0, end - max_bytes)
    broken_off = b""  # of the piece before, the line that began in this one
    with path.open("rb") as file:
        while end > oldest:
            start = max(oldest, end - CHUNK_BYTES)
            file.seek(start)
            content = file.read(end - start) + broken_off
            if start > 0:
                first, newline, content = content.partition(b"\n")
                broken_off = first + newline
            for line in reversed(content.splitlines(keepends=True) if mark in content else []):
                if mark in line and (values := files.parse_jsonl(line)):
                    return values[0]
            end = start
    return None


class JsonlFollower:
    """A .jsonl that grows, read on from where the last look ended.

    A file that was cut, or replaced by another one, which a start does that goes on from an earlier step, is read from
    its beginning again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = 0
        self._offset = 0

    def read_new(
        self, whole_bytes: int, num_pieces: int = 0, piece_bytes: int = 0
    ) -> tuple[list[dict[str, Any]], bool]:
        """(the values that are new, whether they begin anew). Errors: OSError.

        Of a file that is longer than `whole_bytes` only the last of these are read; of what lies before them, so many
        pieces at even distances.
        """
        try:
            status = files.stat_regular_file(self._path)
        except FileNotFoundError:
            begins_anew = self._inode != 0
            self._inode = 0
            self._offset = 0
            return [], begins_anew
        begins_anew = status.st_ino != self._inode or status.st_size < self._offset
        start = 0 if begins_anew else self._offset
        self._inode = status.st_ino
        values: list[dict[str, Any]] = []
        if status.st_size - start > whole_bytes:
            values += self._sample_pieces(start, status.st_size - whole_bytes, num_pieces, piece_bytes)
            start = status.st_size - whole_bytes
        return values + files.parse_jsonl(self._read_lines(start, status.st_size)), begins_anew

    def _read_lines(self, start: int, end: int) -> bytes:
        """The whole lines between two places; the next look begins behind them."""
        content = read_from_line(self._path, start, end)
        whole = content[: content.rfind(b"\n") + 1]
        self._offset = end - (len(content) - len(whole))
        return whole

    def _sample_pieces(self, start: int, end: int, num_pieces: int, piece_bytes: int) -> list[dict[str, Any]]:
        values: list[dict[str, Any]] = []
        for number in range(num_pieces):
            place = start + (end - start) * number // num_pieces
            piece = read_piece(self._path, place, min(place + piece_bytes, end))
            values += files.parse_jsonl(piece)
        return values
