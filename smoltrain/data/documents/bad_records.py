"""Records that are no documents: each is logged with its address and skipped, up to a limit. Empty ones are not bad."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from smoltrain import files
from smoltrain.config.schema import DataSection
from smoltrain.data.documents.readers import BadRecord
from smoltrain.errors import Problem, UserError
from smoltrain.redact import redact_text

BAD_RECORDS_FILE = "bad-records.jsonl"
MIN_ALLOWED_BAD = 100  # so many may be bad whatever share of a source they are
BAD_RECORD_KEYS = "data.max_bad_records or data.max_bad_share"
EARLY_STOP_BAD = 10_000  # more bad records than these, and than good ones, are not read to the end


@dataclass(frozen=True)
class BadRecordEntry:
    """A line of the log."""

    source: str
    place: str
    why: str


def log_bad_record(
    folder: Path, source: str, record: BadRecord, count: int, num_records: int, data: DataSection
) -> BadRecordEntry:
    """Log a bad record, the `count`-th of so many records of its source.

    Errors: UserError past data.max_bad_records; without one, where most of many records are bad. A share of all is
    judged when all are known (`check`), as bad records may stand together.
    """
    bad = BadRecordEntry(source, redact_text(record.place), redact_text(record.why))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / BAD_RECORDS_FILE).open("a", encoding="utf-8") as file:
        file.write(_format_log_line(bad))
    most = max(EARLY_STOP_BAD, num_records // 2) if data.max_bad_records is None else data.max_bad_records
    if count > most:
        raise _too_many_error(f"more than {most:,} records of {source!r}", bad, folder / BAD_RECORDS_FILE)
    return bad


def check_bad_record_share(
    folder: Path, source: str, found: Sequence[BadRecordEntry], num_records: int, data: DataSection
) -> None:
    """Errors: UserError if more of a source's records are bad than may be."""
    if len(found) > bad_record_limit(data, num_records):
        which = f"{len(found):,} of {num_records:,} records of {source!r}"
        raise _too_many_error(which, found[-1], folder / BAD_RECORDS_FILE)


def bad_record_limit(data: DataSection, num_records: int) -> int:
    """How many of so many records may be bad."""
    share = max(MIN_ALLOWED_BAD, int(data.max_bad_share * num_records))
    return share if data.max_bad_records is None else data.max_bad_records


def _too_many_error(which: str, last: BadRecordEntry, log: Path) -> UserError:
    what = f"{which} are bad; the last one: {last.why}"
    want = f"readable records, or a higher limit; all are listed in {log}"
    return UserError(Problem(what, last.place, want, f"{BAD_RECORD_KEYS}, or the data"))


def write_bad_record_log(folder: Path, found: Iterable[BadRecordEntry]) -> None:
    """The log anew; none where nothing is bad."""
    lines = "".join(map(_format_log_line, found))
    if lines:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / BAD_RECORDS_FILE).write_text(lines, encoding="utf-8")
    else:
        (folder / BAD_RECORDS_FILE).unlink(missing_ok=True)


def summarise_bad_records(found: Iterable[BadRecordEntry], folder: Path) -> list[str]:
    """One line for each source that has any: how many, and the first three."""
    by_source: dict[str, list[BadRecordEntry]] = {}
    for bad in found:
        by_source.setdefault(bad.source, []).append(bad)
    return [
        f"{len(some):,} bad record{'s' * (len(some) > 1)} of {name} skipped: "
        + "; ".join(f"{bad.place}: {bad.why}" for bad in some[:3])
        + (f"; the others are in {folder / BAD_RECORDS_FILE}" if len(some) > 3 else "")
        for name, some in by_source.items()
    ]


def _format_log_line(bad: BadRecordEntry) -> str:
    return files.format_json_line(asdict(bad))
