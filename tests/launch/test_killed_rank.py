"""A rank that the kernel's out-of-memory killer ended, for real; and one that somebody else killed."""

import contextlib
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from smoltrain.distributed import memory_limits
from smoltrain.distributed.cgroups import find_cgroup_files
from smoltrain.distributed.memory_limits import KillCount
from smoltrain.errors import FAULT
from smoltrain.launch.killed_rank import KillWatch, describe_kills
from tests import launches, tiny
from tests.training.test_out_of_memory import TOO_LARGE
from tests.zygote import zygote

MIB = 2**20
SIGKILL = -9


def test_only_a_count_that_grew_is_evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "vmstat"
    monkeypatch.setattr(memory_limits, "find_cgroup_files", list)
    monkeypatch.setattr(memory_limits, "VMSTAT", file)
    file.write_text("pgfault 7\noom_kill 3\n")
    watch = KillWatch()
    assert watch.find_evidence(SIGKILL) == "", "killed by somebody else"
    file.write_text("pgfault 9\noom_kill 4\n")
    evidence = f"{file}: oom_kill 3 -> 4, of all processes of this machine"
    assert watch.find_evidence(SIGKILL) == evidence
    assert watch.find_evidence(1) == "", "it has left by itself"
    watch.note_count(100.0)  # just after the kill, before the rank was seen to be gone
    assert watch.find_evidence(SIGKILL) == evidence
    watch.note_count(200.0)
    assert watch.find_evidence(SIGKILL) == "", "that was another process, long ago"
    file.unlink()
    assert watch.find_evidence(SIGKILL) == "", "without a count nothing is claimed"
    assert describe_kills(KillCount(file, 1), KillCount(tmp_path / "other", 2)) == ""


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A memory cgroup inside this process's own, of 1,000 MiB: room for a smaller setting beside the command."""
    files = find_cgroup_files()
    if not files:
        pytest.skip("there is no memory cgroup here")
    folder = files[0].limit.parent / f"smoltrain-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"this user may not make a memory cgroup: {error}")
    try:
        limit = folder / files[0].limit.name
        try:
            limit.write_text(str(1000 * MIB))
            if psutil.swap_memory().total:
                (folder / "memory.swap.max").write_text("0")
        except OSError as error:
            pytest.skip(f"a cgroup here cannot have a limit of its own: {error}")
        yield folder
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


def supervise_inside(cgroup: Path, python: str, words: list[str]) -> int:
    """`smoltrain train` in that cgroup, whose rank is started for real: a preloaded one would be a child of another."""
    from smoltrain.launch import rank_processes, supervisor

    rank_processes.RANK_COMMAND[0] = python
    (cgroup / "cgroup.procs").write_text(str(os.getpid()))
    return supervisor.supervise_run("quickstart", words, 1)


@pytest.mark.slow
def test_the_kernels_killer_is_named_and_ends_in_a_page(small_cgroup: Path, tmp_path: Path) -> None:
    words = tiny.words(tmp_path, *TOO_LARGE)
    life = zygote().fork(1, tmp_path / "log", supervise_inside, small_cgroup, sys.executable, words)
    codes = life.end()
    said = life.text()
    print(said)
    assert codes == [FAULT]
    path = tmp_path / "runs" / "quickstart" / "logs" / "out-of-memory-rank0.txt"
    page = path.read_text()
    print(page)
    [error] = [line for line in said.splitlines() if line.startswith("error: ")]
    host = socket.gethostname()
    assert error.startswith(f"error: rank 0 on {host} ran out of memory before step 1 was done: saw ")
    assert f"(the cgroup's limit, {small_cgroup}/memory." in error
    assert "; change engine.loss=fused" in error
    assert error.endswith(f"; the page is {path}; the same command goes on from the last checkpoint")
    assert f"the kernel's out-of-memory killer ended it by SIGKILL ({small_cgroup}/memory." in page
    assert "oom_kill 0 -> 1)" in page
    [held] = re.findall(r"in all +([\d.]+) +([\d.]+)", page)
    assert 0.5 < float(held[1]) < float(held[0]), "it was killed before it had all that it is estimated to need"
    assert said.count("memory of rank 0") == 1
    launches.wait_until_gone(words)
