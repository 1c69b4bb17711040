"""One file: its name, place, size and version, and how it is shown."""

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from smoltrain.data.documents.shard import Shard, hash_shard, printable_name, stat_shard
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.errors import UserError
from tests.data.documents.files import at, list_shards
from tests.data.documents.texts import both, config, prepared_of, text


def test_a_shard_is_its_name_place_size_and_time(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"hello")
    (shard,) = list_shards(at(tmp_path))
    stat = (tmp_path / "a.txt").stat()
    assert shard == Shard("a.txt", str(tmp_path / "a.txt"), 5, f"mtime {stat.st_mtime_ns}")
    assert shard.is_local
    assert stat_shard(shard) == (shard.size, shard.version)
    assert list_shards(at(f"file://{tmp_path}")) == [shard]
    assert hash_shard(shard) == hashlib.sha256(b"hello").hexdigest()
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match="the file cannot be read"):
        hash_shard(shard)


@pytest.mark.parametrize("mode", ["cached", "stream"])
def test_a_file_name_that_is_not_utf8_trains(root: Path, mode: str, capsys: Any):
    raw = os.fsencode(root / "source") + b"/r\xe9sum\xe9.txt"
    Path(os.fsdecode(raw)).write_text(text(40))
    Path(os.fsdecode(raw.replace(b"r\xe9s", b"b\xe9d"))).write_bytes(b"\xff")  # a bad one, whose place is printed
    prepared = prepared_of(root, mode)
    assert prepare_run_data(config(root, mode)).index == prepared.index
    if mode == "cached":
        assert text(40) in both(prepared)
        assert r"b\xe9dum\xe9.txt" in capsys.readouterr().out.encode().decode()
    else:
        assert r"r\xe9sum\xe9.txt" in [shard.name for shard in prepared.shards[0]]


def test_a_name_is_shown_on_one_line_and_without_commands_to_a_terminal():
    assert printable_name("a\nb\x1b[31m\u2028\udce9 \u3000é𝄞.txt") == "a\\nb\\x1b[31m\\u2028\\xe9 \u3000é𝄞.txt"
