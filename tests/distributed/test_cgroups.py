"""Limits of control groups, from files as the kernel writes them."""

from pathlib import Path

import pytest

from smoltrain.distributed.cgroups import CgroupMemory, CgroupPlaces, find_cgroup_memory, find_cpu_quota

GIB = 2**30


def write_groups(folder: Path, own: str, files: dict[str, str]) -> CgroupPlaces:
    (folder / "own").write_text(own)
    for name, text in files.items():
        path = folder / "mounts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return CgroupPlaces(folder / "mounts", folder / "own")


def test_version_2_the_tightest_group_above_counts(tmp_path: Path) -> None:
    files = write_groups(tmp_path, "0::/slurm/job_7/step\n", {
        "slurm/job_7/step/memory.max": "max\n",
        "slurm/job_7/step/memory.current": "5\n",
        "slurm/job_7/step/memory.stat": "inactive_file 0\n",
        "slurm/job_7/step/cpu.max": "max 100000\n",
        "slurm/job_7/memory.max": f"{4 * GIB}\n",
        "slurm/job_7/memory.current": f"{3 * GIB}\n",
        "slurm/job_7/memory.stat": f"anon 7\ninactive_file {GIB}\n",
        "slurm/job_7/cpu.max": "150000 100000\n",
    })  # fmt: skip
    assert find_cgroup_memory(files) == CgroupMemory(4 * GIB, 2 * GIB, tmp_path / "mounts/slurm/job_7")
    assert find_cpu_quota(files) == 1.5


def test_version_1_and_a_container_that_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    files = write_groups(tmp_path, "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n", {
        "memory/memory.limit_in_bytes": f"{GIB}\n",
        "memory/memory.usage_in_bytes": f"{GIB // 2}\n",
        "memory/memory.stat": "total_inactive_file 0\n",
        "cpu/cpu.cfs_quota_us": "50000\n",
        "cpu/cpu.cfs_period_us": "100000\n",
    })  # fmt: skip
    limit = find_cgroup_memory(files)
    assert limit is not None
    assert (limit.limit, limit.free) == (GIB, GIB // 2)
    assert find_cpu_quota(files) == 0.5


UNLIMITED = {
    "memory/memory.limit_in_bytes": f"{2**63 - 4096}", "memory/memory.usage_in_bytes": "1", "memory/memory.stat": "",
    "cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "9",
}  # fmt: skip


@pytest.mark.parametrize(("own", "files"), [("4:memory:/\n2:cpu:/\n", UNLIMITED), ("0::/\n", {"cgroup.procs": ""})])
def test_without_a_limit_there_is_none(own: str, files: dict[str, str], tmp_path: Path) -> None:
    groups = write_groups(tmp_path, own, files)
    assert find_cgroup_memory(groups) is None
    assert find_cpu_quota(groups) is None
    assert find_cgroup_memory(CgroupPlaces(tmp_path / "none", tmp_path / "none")) is None
