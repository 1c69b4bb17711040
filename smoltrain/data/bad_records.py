"""Records that are no documents: each is logged with its address and skipped, up to a limit."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from smoltrain import redact
from smoltrain.data.readers import BadRecord
from smoltrain.errors import Problem, UserError
from smoltrain.schema import DataSection

FILE = "bad-records.jsonl"


@dataclass(frozen=True)
class Bad:
    """A line of the log."""

    source: str
    place: str
    why: str


def note(folder: Path, source: str, record: BadRecord, count: int, data: DataSection) -> Bad:
    """Log a bad record, the `count`-th of its source. Errors: UserError past data.max_bad_records."""
    bad = Bad(source, redact.text(record.place), redact.text(record.why))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / FILE).open("a", encoding="utf-8") as file:
        file.write(_line(bad))
    if count > data.max_bad_records:
        what = f"more than {data.max_bad_records} records of {source!r} are bad; the last one: {bad.why}"
        want = f"readable records, or a higher limit; all are listed in {folder / FILE}"
        raise UserError(Problem(what, bad.place, want, "data.max_bad_records, or the data"))
    return bad


def write(folder: Path, found: Iterable[Bad]) -> None:
    """The log anew; none where nothing is bad."""
    lines = "".join(map(_line, found))
    if lines:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(lines, encoding="utf-8")
    else:
        (folder / FILE).unlink(missing_ok=True)


def summary(found: Iterable[Bad], folder: Path) -> list[str]:
    """One line for each source that has any: how many, and the first three."""
    by_source: dict[str, list[Bad]] = {}
    for bad in found:
        by_source.setdefault(bad.source, []).append(bad)
    return [
        f"{len(some):,} bad record{'s' * (len(some) > 1)} of {name} skipped: "
        + "; ".join(f"{bad.place}: {bad.why}" for bad in some[:3])
        + (f"; the others are in {folder / FILE}" if len(some) > 3 else "")
        for name, some in by_source.items()
    ]


def _line(bad: Bad) -> str:
    return json.dumps(asdict(bad), ensure_ascii=False) + "\n"
