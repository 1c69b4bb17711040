"""Limits of memory and counts of kills, from files of the kernel that are made up."""

import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from smoltrain.distributed import cgroups, memory_limits
from smoltrain.distributed.cgroups import CgroupPlaces, find_cgroup_files
from smoltrain.distributed.memory_limits import KillCount, find_rank_limit, find_shared_limit, read_kill_count

GIB = 2**30


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 64 GiB whose files lie in a folder."""
    monkeypatch.setattr(cgroups, "PLACES", CgroupPlaces(tmp_path / "sys", tmp_path / "cgroup"))
    monkeypatch.setattr(memory_limits, "VMSTAT", tmp_path / "vmstat")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    (tmp_path / "vmstat").write_text("oom_kill 5\n")
    return tmp_path


def write_cgroup(kernel: Path, version: int, path: str, seen: str) -> Path:
    """The file that tells of a cgroup; where its controller's files are, as `seen` in this container."""
    folder = kernel / "sys" / ("" if version == 2 else "memory") / seen
    folder.mkdir(parents=True)
    name = "0:" if version == 2 else "4:memory"
    (kernel / "cgroup").write_text(f"9:name=systemd:/\n{name}:{path}\n")
    return folder


CHILD = """
import resource
from smoltrain.distributed.memory_limits import read_peak_resident_bytes
print(read_peak_resident_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux keeps a parent's peak")
def test_the_peak_is_that_of_this_program_and_not_of_the_process_that_started_it() -> None:
    held = bytearray(b"x" * 400 * 2**20)
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    peak, with_parents = map(int, done.stdout.split())
    assert len(held) < with_parents
    assert 5 * 2**20 < peak < 200 * 2**20


def test_version_2_and_the_smallest_limit_above_it(kernel: Path) -> None:
    job = write_cgroup(kernel, 2, "/slurm/job7", "slurm/job7")
    (job / "memory.max").write_text("max\n")
    (job.parent / "memory.max").write_text(f"{8 * GIB}\n")
    (job / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    assert find_shared_limit().num_bytes == 8 * GIB
    assert find_shared_limit().source == f"the cgroup's limit, {job.parent / 'memory.max'}"
    assert find_rank_limit(4).num_bytes == 2 * GIB
    assert read_kill_count() == KillCount(job / "memory.events", 2)


def test_version_1_of_a_container(kernel: Path) -> None:
    inside = write_cgroup(kernel, 1, "/docker/abc", "")
    (inside / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (inside / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")
    assert [files.limit.parent for files in find_cgroup_files()] == [inside]
    assert find_shared_limit().source == "all memory of this machine"
    assert read_kill_count() == KillCount(inside / "memory.oom_control", 1)


def test_without_cgroups_the_machine_counts(kernel: Path) -> None:
    assert find_cgroup_files() == []
    count = read_kill_count()
    assert count == KillCount(kernel / "vmstat", 5)
    assert count is not None
    assert count.is_of_machine
    (kernel / "vmstat").unlink()
    assert read_kill_count() is None


def test_a_limit_of_addresses_leaves_what_lies_in_memory(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(rss=2 * GIB, vms=7 * GIB, shared=GIB, data=4 * GIB)
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: now))
    soft = {resource.RLIMIT_AS: 9 * GIB, resource.RLIMIT_DATA: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft[which], soft[which]))
    assert find_rank_limit(1).num_bytes == 4 * GIB, "5 of the 9 GiB are addresses without memory"
    assert find_rank_limit(1).source == "its RLIMIT_AS, a ulimit"
    soft[resource.RLIMIT_DATA] = 5 * GIB
    assert find_rank_limit(1).num_bytes == 3 * GIB, "1 GiB more of data, beside the 2 GiB that lie in memory"
