"""Cores, threads, neighbours and clocks: each with a fault."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from smoltrain.distributed.cgroups import CgroupPlaces
from smoltrain.doctor.check import Finding
from smoltrain.doctor.processor import CpuTimes, check_cpu_clocks, check_neighbours, check_threads, judge_neighbours
from tests.distributed.test_cgroups import write_groups
from tests.doctor.faulty import find_in_child

NO_GROUPS = CgroupPlaces(Path("/nowhere"), Path("/nowhere"))


def bound_to_one_core() -> Finding:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    return check_threads({}, NO_GROUPS)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="this machine has one CPU")
def test_a_process_that_is_bound_to_one_core_is_told(tmp_path: Path) -> None:
    found = find_in_child(tmp_path, bound_to_one_core)
    assert found.status == "warning"
    assert f"bound to 1 of {os.cpu_count()} CPUs" in found.saw


@pytest.mark.parametrize(
    ("variable", "value", "status", "said"),
    [
        ("OMP_NUM_THREADS", "4096", "warning", "OMP_NUM_THREADS=4096 on "),
        ("SMOLTRAIN_THREADS", "many", "fault", "SMOLTRAIN_THREADS=many"),
        ("MKL_NUM_THREADS", "0", "fault", "MKL_NUM_THREADS=0"),
    ],
)
def test_threads_that_do_not_fit_the_cores_are_named(variable: str, value: str, status: str, said: str) -> None:
    found = check_threads({variable: value}, NO_GROUPS)
    assert (found.status, found.saw[: len(said)]) == (status, said)


@pytest.mark.parametrize(("quota", "status"), [("50000", "warning"), ("100000", "ok")])
def test_a_quota_that_is_no_whole_number_stops_threads(quota: str, status: str, tmp_path: Path) -> None:
    groups = write_groups(tmp_path, "0::/\n", {"cpu.max": f"{quota} 100000\n"})
    found = check_threads({"OMP_NUM_THREADS": "1"}, groups)
    assert found.status == status
    assert "the container may use" in found.saw or (os.cpu_count() == 1 and status == "ok")


def test_a_neighbour_that_computes_is_noticed() -> None:
    cores = os.cpu_count() or 1
    spin = [sys.executable, "-S", "-c", "while True: pass"]
    spinning = [subprocess.Popen(spin) for _ in range(cores)]
    try:
        found = check_neighbours(look_s=0.4)
    finally:
        for process in spinning:
            process.kill()
            process.wait()
    assert found.status == "warning"
    assert "others use " in found.saw


def test_own_work_and_stolen_time_are_told_apart() -> None:
    before = CpuTimes(10.0, 1.0, 100.0)
    assert judge_neighbours(before, CpuTimes(12.0, 1.0, 102.0), own_s=2.0, load=1.0).status == "ok"
    found = judge_neighbours(before, CpuTimes(10.5, 1.5, 102.0), own_s=0.0, load=1.0)
    assert (found.status, found.saw) == ("warning", "the machine below this virtual one takes 25% of the time")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"cpufreq/scaling_governor": "powersave\n"}, "the governor `powersave` keeps the clocks low"),
        ({"cpufreq/scaling_max_freq": "1200000\n"}, "1 CPUs may run at 40% of their clock"),
        ({"thermal_throttle/core_throttle_count": "12\n"}, "heat has slowed cores down 12 times since the machine"),
        ({}, "governor performance, full clocks, no core was slowed down by heat"),
    ],
)  # fmt: skip
def test_clocks_that_are_held_back_are_told(files: dict[str, str], said: str, tmp_path: Path) -> None:
    usual = {"scaling_governor": "performance\n", "scaling_max_freq": "3000000\n", "cpuinfo_max_freq": "3000000\n"}
    for name, text in {**{f"cpufreq/{name}": text for name, text in usual.items()}, **files}.items():
        path = tmp_path / "cpu0" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = check_cpu_clocks(tmp_path)
    assert found.saw[: len(said)] == said
    assert (found.status == "warning") == bool(files)
    assert check_cpu_clocks(tmp_path / "cpu0").status == "ok"  # where the kernel tells nothing
