"""Are the files that the ranks say they have written where the manifest will name them? Looked at before the rename."""

import time
from pathlib import Path

from smoltrain.checkpoint.manifest import FileRecord

PATIENCE_S = 30.0  # for a network file system that remembers a folder for a while
POLL_S = 0.2


def find_unseen_file(folder: Path, records: dict[str, FileRecord]) -> str | None:
    """What is wrong with the first file that is not there in its size, in words; None if all are. Waits for each."""
    deadline = time.monotonic() + PATIENCE_S
    for name, record in records.items():
        while fault := _find_fault(folder / name, record["bytes"]):
            if time.monotonic() >= deadline:
                return f"{name} {fault}"
            time.sleep(POLL_S)
    return None


def _find_fault(path: Path, num_bytes: int) -> str | None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return "is not there"
    except OSError as error:
        return f"cannot be looked at ({error.strerror})"
    return None if size == num_bytes else f"has {size} bytes, not {num_bytes}"
