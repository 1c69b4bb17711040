"""Are the files that the ranks say they have written where the manifest will name them? Looked at before the rename."""

import functools
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from smoltrain.checkpoint.manifest import FileRecord

PATIENCE_S = 30.0  # for a network file system that remembers a folder for a while (man 5 nfs: acdirmin)
POLL_S = 0.2


def find_unseen_file(folder: Path, records: dict[str, FileRecord]) -> str | None:
    """What is wrong with the first file that is not there in its size, in words; None if all are. Waits for each."""
    return find_lasting_fault(
        functools.partial(_find_fault, folder, name, record["bytes"]) for name, record in records.items()
    )


def find_lasting_fault(looks: Iterable[Callable[[], str | None]]) -> str | None:
    """The first fault that stays for PATIENCE_S, in which all looks are repeated; None where each ends without one."""
    deadline = time.monotonic() + PATIENCE_S
    for look in looks:
        while fault := look():
            if time.monotonic() >= deadline:
                return fault
            time.sleep(POLL_S)
    return None


def _find_fault(folder: Path, name: str, num_bytes: int) -> str | None:
    try:
        size = (folder / name).stat().st_size
    except FileNotFoundError:
        return f"{name} is not there"
    except OSError as error:
        return f"{name} cannot be looked at ({error.strerror})"
    return None if size == num_bytes else f"{name} has {size} bytes, not {num_bytes}"
