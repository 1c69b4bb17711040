"""How the newest start of a run ended, for whoever looks at the run later: RUN/logs/ending.json.

Rank 0 writes it when it leaves, and a new start removes it. A process that is killed writes nothing: where the file is
missing, and nobody holds the run's lock, the run was killed, or its machine went down.
"""

import json
import time
from pathlib import Path
from typing import Literal, NamedTuple

from smoltrain import files
from smoltrain.redact import redact_text

ENDING_FILE = "logs/ending.json"
EndingKind = Literal["done", "stopped", "failed"]  # done: all that this start was to do, a phase perhaps


class RunEnding(NamedTuple):
    """How a start ended."""

    kind: str
    reason: str  # one line


def write_ending(folder: Path, kind: EndingKind, reason: str) -> None:
    """Write down how the start ends that has trained in this run folder."""
    line = " ".join(redact_text(reason).split())
    files.write_json_file(folder / ENDING_FILE, {"time_s": round(time.time(), 3), "kind": kind, "reason": line})


def remove_ending(folder: Path) -> None:
    """A start begins that has not ended yet."""
    (folder / ENDING_FILE).unlink(missing_ok=True)


def read_ending(folder: Path) -> RunEnding | None:
    """How the newest start ended; None if it was killed, still trains, or is of a version that did not say it."""
    try:
        written = json.loads(files.read_text_file(folder / ENDING_FILE))
        return RunEnding(str(written["kind"]), str(written["reason"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
