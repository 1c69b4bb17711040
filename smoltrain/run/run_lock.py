"""One process at a time prepares or trains a run: a lock on a file beside its folder, until the last holder has ended.

The supervisor takes it before it looks at the run, and rank 0 of each phase inherits the open file: a lock of flock(2)
belongs to the open file description, so it is there until both have closed it, however they end. A supervisor that is
killed while its ranks still save leaves the run locked until they have left. Nobody unlocks it by hand. The file's
time of modification is when the run was last locked.
"""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from smoltrain.config.schema import Config
from smoltrain.errors import Problem, UserError

PATIENCE_S = 40.0  # for a process that is leaving, and may have a checkpoint to write
POLL_S = 0.2
UNWRITABLE_ERRORS = {
    errno.EACCES: "a folder that this user may write",
    errno.EPERM: "a folder that this user may write",
    errno.EROFS: "a file system that is not read-only",
}
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of some network file systems


def lock_run_folder(config: Config, patience_s: float = PATIENCE_S) -> int | None:
    """The right to write to a run's folder: the descriptor of a locked file, to be kept open, or None without locks.

    Waits a while for a process that is leaving. Errors: UserError if another one keeps the lock, or the folder cannot
    be written.
    """
    path = lock_file(config.run.folder, config.run.name)
    deadline = time.monotonic() + patience_s
    try:
        config.run.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        while not _try_lock(descriptor):
            if time.monotonic() >= deadline:
                os.close(descriptor)
                raise UserError(
                    Problem(
                        what="another process trains this run, or prepares its data",
                        saw=str(path),
                        want="one at a time",
                        change="run.name, or end the other one",
                    )
                )
            time.sleep(POLL_S)
        now = time.time()
        os.utime(descriptor, (now, now))
    except OSError as error:
        if want := UNWRITABLE_ERRORS.get(error.errno or 0):
            raise UserError(Problem("the run cannot be written there", str(error), want, "run.folder")) from None
        if error.errno in NO_LOCKS:
            return None
        raise
    return descriptor


def lock_file(runs: Path, name: str) -> Path:
    """The file on which the lock of the run runs/NAME is."""
    return runs / f".{name}.lock"


def is_run_locked(path: Path) -> bool | None:
    """Whether somebody trains the run of this lock file; None where the file system has no locks, or nobody may ask.

    Asking takes a shared lock for a moment: who wants to train then looks again after POLL_S. Nothing is written.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)  # which unlocks it
    return False


@contextlib.contextmanager
def hold_run_lock(config: Config) -> Iterator[int | None]:
    """`lock_run_folder` while the block runs, for a process that goes on: a rank that inherited the file keeps it."""
    lock = lock_run_folder(config)
    try:
        yield lock
    finally:
        if lock is not None:
            os.close(lock)


def _try_lock(descriptor: int) -> bool:
    """Lock the file if nobody else has."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
