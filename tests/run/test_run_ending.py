"""How a start ended is written down once, and is gone when another start begins."""

from pathlib import Path

import pytest

from smoltrain.run.run_ending import ENDING_FILE, read_ending, remove_ending, write_ending


def test_an_ending_is_one_line_without_secrets(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    assert read_ending(tmp_path) is None
    write_ending(tmp_path, "failed", "OSError: https://user:secret@host/x\nis gone")
    ending = read_ending(tmp_path)
    assert ending is not None
    assert ending.kind == "failed"
    assert ending.reason.endswith("is gone")
    assert "secret" not in ending.reason
    assert "\n" not in ending.reason
    remove_ending(tmp_path)
    remove_ending(tmp_path)
    assert read_ending(tmp_path) is None


@pytest.mark.parametrize("content", ["", "[]", '{"kind": "done"}', "[" * 100_000])
def test_what_cannot_be_read_is_no_ending(tmp_path: Path, content: str) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / ENDING_FILE).write_text(content, encoding="utf-8")
    assert read_ending(tmp_path) is None
