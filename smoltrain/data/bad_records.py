"""Records that are no documents: each is logged with its address and skipped, up to a limit. Empty ones are not bad."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from smoltrain import files, redact
from smoltrain.data.readers import BadRecord
from smoltrain.errors import Problem, UserError
from smoltrain.schema import DataSection

FILE = "bad-records.jsonl"
AT_LEAST = 100  # so many may be bad whatever share of a source they are
KEYS = "data.max_bad_records or data.max_bad_share"
HOPELESS = 10_000  # more bad records than these, and than good ones, are not read to the end


@dataclass(frozen=True)
class Bad:
    """A line of the log."""

    source: str
    place: str
    why: str


def note(folder: Path, source: str, record: BadRecord, count: int, num_records: int, data: DataSection) -> Bad:
    """Log a bad record, the `count`-th of so many records of its source.

    Errors: UserError past data.max_bad_records; without one, where most of many records are bad. A share of all is
    judged when all are known (`check`), as bad records may stand together.
    """
    bad = Bad(source, redact.text(record.place), redact.text(record.why))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / FILE).open("a", encoding="utf-8") as file:
        file.write(_line(bad))
    most = max(HOPELESS, num_records // 2) if data.max_bad_records is None else data.max_bad_records
    if count > most:
        raise _too_many(f"more than {most:,} records of {source!r}", bad, folder / FILE)
    return bad


def check(folder: Path, source: str, found: Sequence[Bad], num_records: int, data: DataSection) -> None:
    """Errors: UserError if more of a source's records are bad than may be."""
    if len(found) > allowed(data, num_records):
        which = f"{len(found):,} of {num_records:,} records of {source!r}"
        raise _too_many(which, found[-1], folder / FILE)


def allowed(data: DataSection, num_records: int) -> int:
    """How many of so many records may be bad."""
    share = max(AT_LEAST, int(data.max_bad_share * num_records))
    return share if data.max_bad_records is None else data.max_bad_records


def _too_many(which: str, last: Bad, log: Path) -> UserError:
    what = f"{which} are bad; the last one: {last.why}"
    want = f"readable records, or a higher limit; all are listed in {log}"
    return UserError(Problem(what, last.place, want, f"{KEYS}, or the data"))


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
    return files.json_line(asdict(bad))
