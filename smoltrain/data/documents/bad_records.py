"""Records that are no documents: bad ones are reported and skipped, up to a limit; empty ones are skipped.

What is tokenised before the run is logged in bad-records.jsonl; a stream says it on the console.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from smoltrain import files
from smoltrain.config.schema import DataSection
from smoltrain.data.documents.records import BadRecord
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
    """Log a bad record, the `count`-th of `num_records` records of its source so far.

    Errors: UserError past data.max_bad_records; without one, where most of many records are bad. A share of all is
    judged when all are known (`check_bad_record_share`), as bad records may stand together.
    """
    entry = BadRecordEntry(source, redact_text(record.place), redact_text(record.why))
    log = folder / BAD_RECORDS_FILE
    folder.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(_format_log_line(entry))
    limit = max(EARLY_STOP_BAD, num_records // 2) if data.max_bad_records is None else data.max_bad_records
    if count > limit:
        raise _too_many_error(f"more than {limit:,} records of {source!r}", entry, log)
    return entry


def check_bad_record_share(
    folder: Path, source: str, bad: Sequence[BadRecordEntry], num_records: int, data: DataSection
) -> None:
    """Called when all records are known. Errors: UserError if more of a source's are bad than may be."""
    if len(bad) > bad_record_limit(data, num_records):
        which = f"{len(bad):,} of {num_records:,} records of {source!r}"
        raise _too_many_error(which, bad[-1], folder / BAD_RECORDS_FILE)


def bad_record_limit(data: DataSection, num_records: int) -> int:
    """How many of so many records may be bad."""
    if data.max_bad_records is not None:
        return data.max_bad_records
    return max(MIN_ALLOWED_BAD, int(data.max_bad_share * num_records))


def _too_many_error(which: str, last: BadRecordEntry, log: Path) -> UserError:
    what = f"{which} are bad; the last one: {last.why}"
    want = f"readable records, or a higher limit; all are listed in {log}"
    return UserError(Problem(what, last.place, want, f"{BAD_RECORD_KEYS}, or the data"))


def write_bad_record_log(folder: Path, entries: Iterable[BadRecordEntry]) -> None:
    """The log anew; none where nothing is bad."""
    log = folder / BAD_RECORDS_FILE
    lines = "".join(_format_log_line(entry) for entry in entries)
    if lines:
        folder.mkdir(parents=True, exist_ok=True)
        log.write_text(lines, encoding="utf-8")
    else:
        log.unlink(missing_ok=True)


def summarise_bad_records(entries: Iterable[BadRecordEntry], folder: Path) -> list[str]:
    """One line for each source that has any: how many, and the first three."""
    by_source: dict[str, list[BadRecordEntry]] = {}
    for entry in entries:
        by_source.setdefault(entry.source, []).append(entry)
    lines: list[str] = []
    for source, bad in by_source.items():
        noun = "bad record" if len(bad) == 1 else "bad records"
        first_three = "; ".join(f"{entry.place}: {entry.why}" for entry in bad[:3])
        rest = f"; the others are in {folder / BAD_RECORDS_FILE}" if len(bad) > 3 else ""
        lines.append(f"{len(bad):,} {noun} of {source} skipped: {first_three}{rest}")
    return lines


def _format_log_line(entry: BadRecordEntry) -> str:
    return files.format_json_line(asdict(entry))
