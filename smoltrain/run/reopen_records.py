"""The records of a run that goes on: what an interrupted run wrote of later steps is cut off, damage is set aside."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from smoltrain import files


def reopen_jsonl(
    path: Path, step: int, say: Callable[[str], None], *, keys: Sequence[str] = ("step",), undone: Path | None = None
) -> tuple[TextIO, list[files.JsonLine], list[files.JsonLine]]:
    """Open a .jsonl for appending after `step`: (the file, the lines that it keeps, those of later steps).

    The latter, which an interrupted run wrote, are cut off, as those steps are done again; they are appended
    to `undone`, if that is given. Damaged lines are set aside in a file of their own, which is said.
    """
    kept: list[files.JsonLine] = []
    later: list[files.JsonLine] = []
    damaged: list[files.JsonLine] = []
    for line in files.read_jsonl_lines(path, keys):
        if line.fault:
            damaged.append(line)
        elif line.value["step"] <= step:
            kept.append(line)
        else:
            later.append(line)
    if undone:
        _append_lines(undone, later)
    if damaged:
        aside = path.with_suffix(".damaged")
        _append_lines(aside, damaged)
        say(f"WARNING: {files.describe_damaged_lines(path, damaged)}; set aside in {aside}")
    files.keep_jsonl_lines(path, kept)  # last: a crash before leaves every line where it was
    return path.open("a", encoding="utf-8"), kept, later


def _append_lines(path: Path, lines: list[files.JsonLine]) -> None:
    if lines:
        with path.open("ab") as file:
            file.writelines(line.raw for line in lines)
