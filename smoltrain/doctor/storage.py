"""The disks of a run: is there a folder that may be written, room for its checkpoints, and how fast is it?"""

import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from smoltrain.doctor.check import Finding
from smoltrain.doctor.needs import RunNeeds
from smoltrain.files import describe_error

MIB = 2**20
PIECE_BYTES = 4 * MIB
MOST_BYTES, MOST_S = 64 * MIB, 1.0  # that are written to see how fast a disk is
SLOW_MIB_S = 30.0
SLOW_SAVE_S = 60.0
SPARE_BYTES = 64 * MIB  # beside a checkpoint, as checkpoint/saver.py wants it


def check_disk(key: str, folder: Path, estimate: Callable[[], RunNeeds] | None = None) -> Finding:
    """Room and speed of the disk where `folder` is or would be made, and the right to write there.

    `key` is the setting that names another place. Errors: OSError, UserError of the estimate.
    """
    place = find_existing_folder(folder)
    free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    try:
        speed = measure_write_speed(place)
    except OSError as error:
        advice = f"free some space, or another {key}" if free < SPARE_BYTES else f"a folder that may be written: {key}"
        return Finding("fault", f"{place} cannot be written: {describe_error(error)}", advice)
    saw = f"{free / 2**30:,.1f} GiB free, writes {speed:,.0f} MiB/s at {place}"
    if estimate is not None:
        needs = estimate()
        one = needs.checkpoint_bytes
        all_of_them = one * needs.num_checkpoints
        size = f"a checkpoint takes {one / 2**30:.2f} GiB"
        size += f", at most {needs.num_checkpoints} of them {all_of_them / 2**30:.1f} GiB"
        if free < one + SPARE_BYTES:
            return Finding("fault", f"{saw}; {size}", f"free some space, or another {key}")
        if free < all_of_them + SPARE_BYTES:
            advice = f"free some space, another {key}, or a smaller checkpoint.keep_last"
            return Finding("warning", f"{saw}; {size}", advice)
        if one / MIB / speed > SLOW_SAVE_S:
            saw = f"{saw}: a checkpoint would take {one / MIB / speed:,.0f} s to write"
            return Finding("warning", saw, f"a faster disk for {key}, or a larger checkpoint.every")
        saw = f"{saw}; {size}"
    if free < SPARE_BYTES:
        return Finding("fault", f"{saw}: no checkpoint has room", f"free some space, or another {key}")
    if speed < SLOW_MIB_S:
        return Finding("warning", f"{saw}: slow", f"a faster disk for {key}; who else writes there?")
    return Finding("ok", saw)


def find_existing_folder(folder: Path) -> Path:
    """The folder itself, or the nearest above it that is there. Errors: OSError where that is no folder."""
    for place in (folder.absolute(), *folder.absolute().parents):
        if place.is_dir():
            return place
        if place.exists() or place.is_symlink():
            raise NotADirectoryError(f"{place} is no folder")
    return Path("/")


def measure_write_speed(place: Path) -> float:
    """MiB a second that reach the disk: a second at most, in a file that is gone then. Errors: OSError."""
    path = place / f".smoltrain-doctor-{secrets.token_hex(8)}"
    piece = os.urandom(PIECE_BYTES)  # which no file system makes small
    written = 0
    began = time.monotonic()
    try:
        with path.open("xb", buffering=0) as file:
            while written < MOST_BYTES and time.monotonic() - began < MOST_S:
                written += file.write(piece)
                os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)
    return written / MIB / max(time.monotonic() - began, 1e-6)
