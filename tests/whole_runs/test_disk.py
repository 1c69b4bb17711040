"""A disk that is full, may not be written, or is slow: the run goes on, or ends with one line and its last checkpoint.

The disk is a small tmpfs of its own. A rank stops itself (SIGSTOP) at the moment in question, the test fills the disk
or takes the right to write away, and lets the rank go on: what it meets then is the kernel's own error.
"""

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from smoltrain.checkpoint.manifest import Manifest, list_checkpoint_steps, step_folder, verify_checkpoint
from smoltrain.errors import BAD_INPUT, FAULT
from tests import tiny
from tests.whole_runs.test_corruption import needs_capabilities, without_privileges
from tests.whole_runs.test_crash import check_same, in_checkpoints, stop_at
from tests.zygote import Life, State, zygote

DISK_MIB = 160  # of which a save wants 64 to be free
STEPS = 8
SETTINGS = (
    "phases.main.steps=6", "phases.continuation.steps=2", "checkpoint.every=2", "sample.every=0", "model.dropout=0.1",
)  # fmt: skip


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={DISK_MIB}m", "smoltrain-test", str(mounted)]
    try:
        subprocess.run(["mount", *options], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", b"").decode() or error
        pytest.skip(
            f"no tmpfs can be mounted here ({why}); tests/checkpoint/test_saver.py says that the disk is nearly full"
        )
    yield mounted
    subprocess.run(["umount", "--lazy", str(mounted)], check=True)


def words(folder: Path, *overrides: str) -> list[str]:
    return tiny.words(folder, *SETTINGS, *overrides)


def fill(disk: Path) -> None:
    """Leave no byte free, even if somebody else writes meanwhile."""
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    assert shutil.disk_usage(disk).free == 0


def check_ends_well(life: Life, run: Path, last: int) -> None:
    """All ranks left, by themselves, with a readable line that names the last checkpoint, which is whole."""
    codes, said = life.end(), life.text()
    assert set(codes) <= {FAULT, BAD_INPUT}, said[-4000:]
    assert "Traceback" not in said, said[-4000:]
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert [line for line in lines if re.search(rf"step {last}\b.*intact", line)], lines
    assert list_checkpoint_steps(run / "checkpoints")[-1] == last
    assert isinstance(verify_checkpoint(step_folder(run / "checkpoints", last)), Manifest)


def check_completes(folder: Path, log: Path, last: int) -> None:
    """The same command goes on from that checkpoint when there is room again."""
    life = zygote().train(words(folder), 2, log)
    assert life.end() == [0, 0], life.text()
    assert f"restored step {last} on 2 ranks" in life.text()
    assert list_checkpoint_steps(folder / "runs" / "quickstart" / "checkpoints")[-1] == STEPS


def until_stopped(life: Life) -> list[State]:
    return life.wait(lambda states: "stopped" in states or all(isinstance(state, int) for state in states))


# ---- full


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "stage", "nth"), [(0, "copy to the host", 2), (1, "shard", 3), (0, "weights", 2), (0, "manifest", 2)]
)
def test_a_disk_that_fills_up_during_a_save(disk: Path, tmp_path: Path, rank: int, stage: str, nth: int) -> None:
    run = disk / "runs" / "quickstart"
    life = zygote().train(words(disk), 2, tmp_path / "log", stop_at, rank, stage, nth, "before")
    assert "stopped" in until_stopped(life), life.text()
    assert list_checkpoint_steps(run / "checkpoints") == [2]
    fill(disk)
    life.resume()
    check_ends_well(life, run, last=2)
    assert "No space left on device" in life.text()
    (disk / "filler").unlink()
    check_completes(disk, tmp_path / "again", last=2)


@pytest.mark.slow
def test_a_disk_that_is_nearly_full_is_told_before_anything_is_written(disk: Path, tmp_path: Path) -> None:
    run = disk / "runs" / "quickstart"
    life = zygote().train(words(disk), 2, tmp_path / "log", stop_at, 0, "copy to the host", 1, "after")
    assert "stopped" in until_stopped(life), life.text()
    with (disk / "filler").open("wb") as file:  # 1 MiB is enough for step 2, and nothing for step 4
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - (2 << 20))
    life.resume()
    check_ends_well(life, run, last=2)
    assert life.end() == [BAD_INPUT] * 2
    assert "the disk is nearly full" in life.text()
    assert not list((run / "checkpoints").glob("*.tmp"))


@pytest.mark.slow
def test_a_disk_without_room_for_a_checkpoint_is_told_before_the_first_step(disk: Path, tmp_path: Path) -> None:
    with (disk / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - (32 << 20))
    life = zygote().train(words(disk), 2, tmp_path / "log")
    assert life.end() == [BAD_INPUT] * 2
    assert "the disk is nearly full" in life.text()
    assert "there is no checkpoint before it" in life.text()
    run = disk / "runs" / "quickstart"
    assert not [name for name in ("config.yaml", "metrics.jsonl") if (run / name).exists()]
    (disk / "filler").unlink()
    assert zygote().train(words(disk), 2, tmp_path / "log").end() == [0, 0]


def reserve(path: Path) -> None:
    """Room for a file to grow by, which nobody else can take; its size stays as it is."""
    keep_size, room = 1, 1 << 20  # of linux/falloc.h
    with path.open("ab") as file:
        assert (
            ctypes.CDLL(None).fallocate(file.fileno(), keep_size, ctypes.c_long(file.tell()), ctypes.c_long(room)) == 0
        )


GROWING = ("metrics.jsonl", "ledger.bin", "logs/rank0.log", "logs/rank1.log")


@pytest.mark.slow
@pytest.mark.parametrize("name", GROWING[:3])
def test_a_disk_that_fills_up_between_two_saves(disk: Path, tmp_path: Path, name: str) -> None:
    more = (
        "phases.main.steps=2", "phases.continuation.steps=100", "checkpoint.every=0", "checkpoint.background=false",
        "evaluate.every=0", "track.print_every=1",
    )  # fmt: skip
    run = disk / "runs" / "quickstart"
    life = zygote().train(words(disk, *more), 2, tmp_path / "log", stop_at, 0, "a step", 4, "before")
    assert "stopped" in until_stopped(life), life.text()
    for other in {*GROWING} - {name}:
        reserve(run / other)
    fill(disk)
    life.resume()
    check_ends_well(life, run, last=2)
    assert "No space left on device" in life.text() or "the disk is nearly full" in life.text()


# ---- not to be written


@needs_capabilities
@pytest.mark.slow
def test_checkpoints_that_may_not_be_written_any_more(tmp_path: Path) -> None:
    checkpoints = tmp_path / "runs" / "quickstart" / "checkpoints"
    sabotage = (without_privileges, stop_at, 0, "a step", 4, "before")
    life = zygote().train(words(tmp_path, "checkpoint.background=false"), 2, tmp_path / "log", *sabotage)
    assert "stopped" in until_stopped(life), life.text()
    checkpoints.chmod(0o555)
    life.resume()
    check_ends_well(life, checkpoints.parent, last=2)
    assert "Permission denied" in life.text()
    checkpoints.chmod(0o755)
    check_completes(tmp_path, tmp_path / "again", last=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run that stopped behind its first phase."""
    folder = tmp_path_factory.mktemp("trained")
    life = zygote().train(words(folder, "run.stop_after=main"), 2, folder / "log")
    assert life.end() == [0, 0], life.text()
    return folder / "runs" / "quickstart"


def check_refused(life: Life, run: Path, path: Path) -> None:
    """All ranks left with a readable line that names the place; nothing was deleted."""
    codes, said = life.end(), life.text()
    assert set(codes) <= {FAULT, BAD_INPUT}, said[-4000:]
    assert "Traceback" not in said, said[-4000:]
    assert [line for line in said.splitlines() if line.startswith("error: ") and str(path) in line], said[-4000:]
    assert list_checkpoint_steps(run / "checkpoints")[-1] == 6


@needs_capabilities
@pytest.mark.slow
@pytest.mark.parametrize("name", ["", "ledger.bin"])
def test_a_run_that_may_not_be_written_is_refused_by_name(trained: Path, tmp_path: Path, name: str) -> None:
    run = tmp_path / "runs" / "quickstart"
    shutil.copytree(trained, run)
    path = run / name
    path.chmod(0o555 if path.is_dir() else 0o444)
    check_refused(zygote().train(words(tmp_path), 2, tmp_path / "log", without_privileges), run, path)


@pytest.mark.slow
def test_a_read_only_file_system_is_refused_by_name(trained: Path, disk: Path, tmp_path: Path) -> None:
    run = disk / "runs" / "quickstart"
    shutil.copytree(trained, run)
    arguments = words(disk)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    check_refused(zygote().train(arguments, 2, tmp_path / "log"), run, disk / "runs")


# ---- slow


def sync_slowly(seconds: float) -> None:
    """fsync(2) as on a disk that is busy."""
    real = os.fsync

    def slow(handle: int) -> None:
        if in_checkpoints(handle):
            time.sleep(seconds)
        real(handle)

    os.fsync = slow


@pytest.mark.slow
@pytest.mark.parametrize("background", [True, False])
def test_a_slow_disk_changes_nothing(tmp_path: Path, background: bool) -> None:
    runs = []
    for name, sabotage in (("slow", (sync_slowly, 0.2)), ("fast", ())):
        folder = tmp_path / name
        folder.mkdir()
        life = zygote().train(words(folder, f"checkpoint.background={background}"), 2, folder / "log", *sabotage)
        assert life.end() == [0, 0], life.text()
        runs.append(folder / "runs" / "quickstart")
    check_same(*runs, last_step=STEPS)
    assert list_checkpoint_steps(runs[0] / "checkpoints") == list_checkpoint_steps(runs[1] / "checkpoints")
