"""Records that are read from their end, and on from where the last look ended."""

import itertools
from pathlib import Path

import pytest

from smoltrain.monitor import tail
from smoltrain.monitor.tail import JsonlFollower, find_last_line, read_piece, read_tail
from tests.monitor.records import step_line, validation_line, write_lines


def test_a_tail_is_of_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"one\ntwo\nthree\nfou")
    assert read_tail(path, 100) == b"one\ntwo\nthree\n"
    assert read_tail(path, 13) == b"two\nthree\n", "a line that begins at the edge is whole"
    assert read_tail(path, 12) == b"three\n"
    assert read_tail(tmp_path / "none", 5) == b""
    assert read_piece(path, 4, 8) == b"two\n"


@pytest.mark.parametrize("chunk", [7, 64, 1000, 2**20])
def test_the_last_line_with_a_mark_is_found_wherever_pieces_end(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail, "CHUNK_BYTES", chunk)
    path = tmp_path / "metrics.jsonl"
    lines = [step_line(step) for step in range(1, 21)]
    lines[6:6] = [validation_line(6, 5.0)]
    lines[13:13] = [validation_line(12, 4.0)]
    write_lines(path, lines)
    mark = b'"validation/loss_nats_per_token"'
    assert find_last_line(path, mark, 2**20) == validation_line(12, 4.0)
    assert find_last_line(path, b'"nowhere"', 2**20) is None
    assert find_last_line(path, mark, 1000) is None, "it lies farther back than one may look"
    content = path.read_bytes()
    path.write_bytes(
        content.replace(b'"validation/loss_nats_per_token": 4.0', b'"validation/loss_nats_per_token": 9.0')
    )
    assert find_last_line(path, mark, 2**20) == validation_line(6, 5.0), "the checksum of the other one differs"


def test_of_a_long_file_little_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [step_line(step) for step in range(1, 2001)])
    amounts: list[int] = []
    real = tail.read_from_line

    def read(path: Path, start: int, end: int) -> bytes:
        amounts.append(end - start)
        return real(path, start, end)

    monkeypatch.setattr(tail, "read_from_line", read)
    values, begins_anew = JsonlFollower(path).read_new(20_000, num_pieces=10, piece_bytes=2_000)
    assert path.stat().st_size > 700_000
    assert sum(amounts) <= 20_000 + 10 * 2_000
    steps = [value["step"] for value in values]
    assert begins_anew
    assert steps == sorted(set(steps)), "each once, in order"
    assert steps[-1] == 2000
    assert steps[0] < 10
    assert max(b - a for a, b in itertools.pairwise(steps)) < 250, "pieces of all of it"


def test_what_is_appended_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = JsonlFollower(path)
    assert follower.read_new(10**6) == ([], False)
    write_lines(path, [step_line(1), step_line(2)])
    assert follower.read_new(10**6) == ([step_line(1), step_line(2)], True)
    whole = tmp_path / "whole"
    write_lines(whole, [step_line(3)])
    with path.open("ab") as file:
        file.write(whole.read_bytes()[:50])
        file.flush()
        assert follower.read_new(10**6) == ([], False), "a line in the making"
        file.write(whole.read_bytes()[50:])
    assert follower.read_new(10**6) == ([step_line(3)], False)
    assert follower.read_new(10**6) == ([], False)


def test_a_file_that_was_cut_or_replaced_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [step_line(1), step_line(2)])
    follower = JsonlFollower(path)
    follower.read_new(10**6)
    write_lines(path, [step_line(1)])
    assert follower.read_new(10**6) == ([step_line(1)], True)
    other = tmp_path / "other"
    write_lines(other, [step_line(1), step_line(2, loss=3.0), step_line(3)])
    other.replace(path)
    assert follower.read_new(10**6) == ([step_line(1), step_line(2, loss=3.0), step_line(3)], True)
    path.unlink()
    assert follower.read_new(10**6) == ([], True)
