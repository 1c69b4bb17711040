"""Compressed files: frames, windows, bombs, and those that are broken."""

import gzip
import tracemalloc

import pytest
import zstandard

from smoltrain.data.documents.records import BadRecord, BrokenFile
from tests.data.documents.reading import LINES_OF_TWO, MIB, ZSTD_FRAMES, compressed, problem, records, texts


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_broken_compressed_file_names_the_place(suffix: str):
    lines = b"".join(b'{"text": "%032x"}\n' % (i * 2**64 // 7) for i in range(20_000))
    whole = compressed(lines, suffix)
    line = problem(f"a.jsonl{suffix}", whole[: len(whole) // 2], BrokenFile)
    assert "the file cannot be decompressed" in line
    assert f"want a whole {suffix} file" in line
    assert 1000 < int(line.rpartition(f"a.jsonl{suffix}:")[2]) < 19_000  # zstd gives up a whole block of 128 KiB
    assert problem(f"a.jsonl{suffix}", lines, BrokenFile).endswith(f"a.jsonl{suffix}:1")
    assert problem(f"a.txt{suffix}", lines, BrokenFile).endswith(f"a.txt{suffix}")
    assert problem(f"a.txt{suffix}", lines, BrokenFile, documents="separator").endswith(f"a.txt{suffix}, part 1")
    assert "the file cannot be decompressed" in problem(f"a.txt{suffix}", whole + b"rest", BrokenFile)


def test_what_zstd_and_gzip_themselves_write_in_several_frames():
    """Two frames, as `cat a.zst b.zst` or a parallel compressor makes; the zstd ones were written by zstd 1.5.4."""
    assert texts("a.jsonl.zst", bytes.fromhex(ZSTD_FRAMES)) == ["one", "two"]
    frames = gzip.compress(b'{"text": "on') + gzip.compress(b'e"}\n{"text": "two"}\n')
    assert texts("b.jsonl.gz", frames) == ["one", "two"]


def test_a_window_of_two_gigabytes_is_read():
    """As `zstd --long=31` asks for; the frame's header is made to say so."""
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=27, enable_ldm=True)
    writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    raw = bytearray(writer.compress(LINES_OF_TWO) + writer.flush())
    assert zstandard.get_frame_parameters(bytes(raw)).window_size == 2**27
    raw[5] = (31 - 10) << 3
    assert zstandard.get_frame_parameters(bytes(raw)).window_size == 2**31
    skippable = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
    for frames, expected in ((raw, 1), (raw * 3, 3), (skippable + raw + skippable + bytes.fromhex(ZSTD_FRAMES), 2)):
        assert texts("a.jsonl.zst", bytes(frames)) == ["one", "two"] * expected
    assert "saw it ends within a frame" in problem("a.jsonl.zst", bytes(raw[:-3]), BrokenFile)


def test_a_bomb_of_zstd_comes_out_piece_by_piece():
    raw = zstandard.compress(b"\0" * 100 * MIB)
    tracemalloc.start()
    (bad,) = records("a.jsonl.zst", raw, mib=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(bad, BadRecord)
    assert peak < 80 * MIB
