"""Which cores a rank takes: machines in a folder, and the threads of a real process."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from smoltrain.distributed import cgroups, cpu_cores
from smoltrain.distributed.cgroups import CgroupPlaces
from smoltrain.distributed.cpu_cores import Core, CpuShare, assign_cores
from smoltrain.distributed.world import _find_cpu_share, _gather_cores_of_this_machine
from smoltrain.errors import UserError
from tests.distributed.test_cgroups import write_groups
from tests.ranks import world

ONE_SOCKET: list[Core] = [(0,), (1,), (2,), (3,)]
HYPERTHREADS: list[Core] = [(0, 4), (1, 5), (2, 6), (3, 7)]


def machine(
    folder: Path, monkeypatch: pytest.MonkeyPatch, siblings: dict[int, str], sockets: dict[int, int] | None = None
) -> None:
    """A machine whose kernel says this of each CPU; this process may use all of them."""
    for cpu, text in siblings.items():
        topology = folder / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(text + "\n")
        (topology / "physical_package_id").write_text(f"{(sockets or {}).get(cpu, 0)}\n")
    monkeypatch.setattr(cpu_cores, "CPUS", folder)
    monkeypatch.setattr(cgroups, "PLACES", CgroupPlaces(folder, folder / "none"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(siblings))


def test_hyperthreads_are_one_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(tmp_path, monkeypatch, {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"})
    assert cpu_cores.usable_cores() == [(0, 2), (1, 3)]
    assert cpu_cores.num_cores() == 2
    machine(tmp_path / "neighbours", monkeypatch, {0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"})
    assert cpu_cores.usable_cores() == [(0, 1), (2, 3)]


def test_the_cores_of_a_socket_stand_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(tmp_path, monkeypatch, {cpu: str(cpu) for cpu in range(4)}, {0: 0, 1: 1, 2: 0, 3: 1})
    assert cpu_cores.usable_cores() == [(0,), (2,), (1,), (3,)]


def test_a_cpu_of_which_the_kernel_says_nothing_is_a_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_cores, "CPUS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5, 7})
    assert cpu_cores.usable_cores() == [(0,), (5,), (7,)]
    monkeypatch.delattr(os, "sched_getaffinity")
    assert len(cpu_cores.usable_cores()) == (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("quota", "num"), [("max 100000", 4), ("200000 100000", 2), ("250000 100000", 2), ("50000 100000", 1), ("", 4)]
)
def test_a_container_has_the_cores_that_its_quota_pays_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, num: int
) -> None:
    machine(tmp_path, monkeypatch, {cpu: str(cpu) for cpu in range(4)})
    monkeypatch.setattr(cgroups, "PLACES", write_groups(tmp_path, "0::/slurm/job_7\n", {}))
    assert cpu_cores.num_cores() == 4, "there is no such file outside a container"
    write_groups(tmp_path, "0::/slurm/job_7\n", {"slurm/job_7/cpu.max": "max 100000", "slurm/cpu.max": quota})
    assert cpu_cores.num_cores() == num


@pytest.fixture
def four_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(tmp_path, monkeypatch, {cpu: str(cpu) for cpu in range(4)})


@pytest.mark.usefixtures("four_cores")
@pytest.mark.parametrize("num", [2, 3, 4])
@pytest.mark.parametrize("machine", [ONE_SOCKET, HYPERTHREADS])
def test_ranks_share_whole_cores_evenly_and_no_core_twice(machine: list[Core], num: int) -> None:
    shares = [assign_cores([machine] * num, place) for place in range(num)]
    assert {each.threads for each in shares} == {4 // num}
    taken = [cpu for each in shares for cpu in each.cpus]
    assert len(taken) == len(set(taken)) == num * (4 // num) * len(machine[0])
    for each in shares:
        assert all(set(core) <= each.cpus or not set(core) & each.cpus for core in machine)
    assert assign_cores([machine] * 2, 1).how == "bound to 2 cores of its own"


@pytest.mark.usefixtures("four_cores")
def test_who_is_not_bound_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert assign_cores([ONE_SOCKET], 0) == CpuShare(4, frozenset(), "not bound")
    assert assign_cores([ONE_SOCKET] * 5, 4) == CpuShare(1, frozenset(), "not bound: 5 ranks on 4 cores")
    assert assign_cores([ONE_SOCKET] * 2, 1, 3) == CpuShare(3, frozenset(), "not bound, as SMOLTRAIN_THREADS is set")
    apart: list[list[Core]] = [[(0,), (1,), (2,)], [(3,)]]
    assert assign_cores(apart, 0) == CpuShare(3, frozenset(), "bound to 3 cores by the launcher")
    assert assign_cores(apart, 1) == CpuShare(1, frozenset(), "bound to 1 core by the launcher")
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    assert assign_cores([ONE_SOCKET] * 2, 1) == CpuShare(2, frozenset(), "not bound: this system cannot")


@pytest.mark.usefixtures("four_cores")
def test_a_quota_leaves_fewer_threads_than_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "PLACES", write_groups(tmp_path, "0::/\n", {"cpu.max": "200000 100000"}))
    assert assign_cores([ONE_SOCKET] * 2, 0) == CpuShare(1, frozenset({0, 1}), "bound to 2 cores of its own")


def binds_its_threads() -> None:
    """What runs in a process of its own: its other tests need their cores."""
    [first, *_] = before = os.sched_getaffinity(0)
    done, seen = threading.Event(), list[set[int]]()
    older = threading.Thread(target=done.wait)
    older.start()
    with cpu_cores.bind_to_cpus(frozenset({first})):
        younger = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
        younger.start()
        younger.join()
        seen += [os.sched_getaffinity(0), os.sched_getaffinity(older.native_id or 0)]
    assert seen == [{first}] * 3, seen
    assert os.sched_getaffinity(0) == os.sched_getaffinity(older.native_id or 0) == before
    done.set()
    with cpu_cores.bind_to_cpus(frozenset()):
        assert os.sched_getaffinity(0) == before


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="macOS cannot; what a run does there is tested above")
def test_all_threads_are_bound_inside_and_free_again_afterwards() -> None:
    code = "from tests.distributed.test_cpu_cores import binds_its_threads; binds_its_threads()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def share_of_a_rank(threads: str) -> CpuShare | str:
    """What a rank is given where SMOLTRAIN_THREADS says this, or the error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOLTRAIN_THREADS", threads)
        try:
            return _find_cpu_share(_gather_cores_of_this_machine(world()), world().rank)
        except UserError as error:
            return str(error)


def test_real_ranks_agree_on_their_shares(ranks: Any) -> None:
    first, second = ranks(2).run(share_of_a_rank, "")
    assert first.threads == second.threads == max(1, cpu_cores.num_cores() // 2)
    assert not first.cpus & second.cpus
    assert len(first.cpus) == len(second.cpus)
    assert bool(first.cpus) == (cpu_cores.num_cores() > 1)


def test_a_number_of_threads_may_be_asked_for(ranks: Any) -> None:
    assert (
        ranks(2).run(share_of_a_rank, "3") == [CpuShare(3, frozenset(), "not bound, as SMOLTRAIN_THREADS is set")] * 2
    )
    end = "want a whole number, 1 or more; change the environment variable SMOLTRAIN_THREADS"
    for wrong in ("two", "0", "-1", "1.5"):
        assert ranks(2).run(share_of_a_rank, wrong) == [f"no number of threads: saw '{wrong}', {end}"] * 2
