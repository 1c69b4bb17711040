"""What the kernel allows: each limit is really set, in a process of its own, or stands in a file as Linux has it."""

import resource
from pathlib import Path

import pytest

from smoltrain.distributed.cgroups import CgroupPlaces
from smoltrain.doctor.check import Finding
from smoltrain.doctor.limits import check_locked_memory, check_memory, check_open_files, check_shared_memory
from smoltrain.doctor.needs import RunNeeds, estimate_needs
from tests import tiny
from tests.distributed.test_cgroups import GIB, write_groups
from tests.doctor.faulty import find_in_child, mount_tmpfs, needs_namespaces

NO_GROUPS = CgroupPlaces(Path("/nowhere"), Path("/nowhere"))


def with_open_files(soft: int, hard: int) -> Finding:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return check_open_files()


@pytest.mark.parametrize(
    ("soft", "hard", "status", "advice"),
    [(128, 4096, "fault", "ulimit -n 4096"), (512, 512, "warning", "limits.conf"), (4096, 8192, "ok", "")],
)
def test_few_open_files_are_told(soft: int, hard: int, status: str, advice: str, tmp_path: Path) -> None:
    found = find_in_child(tmp_path, with_open_files, soft, hard)
    assert found.status == status
    assert f"{soft:,} files" in found.saw
    assert advice in found.advice


def with_locked_memory(infiniband: Path) -> Finding:
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (64 * 1024, 64 * 1024))
    return check_locked_memory(infiniband)


def test_locked_memory_matters_where_there_is_infiniband(tmp_path: Path) -> None:
    assert find_in_child(tmp_path, with_locked_memory, tmp_path / "none").status == "ok"
    (tmp_path / "class" / "mlx5_0").mkdir(parents=True)
    found = find_in_child(tmp_path, with_locked_memory, tmp_path / "class")
    assert (found.status, found.saw) == ("warning", "0 MiB may be locked, and NCCL over mlx5_0 wants to lock more")


def needs(memory_gib: float, device_gib: float | None = None) -> RunNeeds:
    device = "cpu" if device_gib is None else "cuda"
    return RunNeeds(2, device, memory_gib * GIB, (device_gib or 8) * GIB, GIB, 3)


def test_a_recipe_that_a_container_has_no_room_for_is_a_fault(tmp_path: Path) -> None:
    group = {"memory.max": f"{GIB}", "memory.current": f"{GIB // 2}", "memory.stat": "inactive_file 0\n"}
    groups = write_groups(tmp_path, "0::/\n", group)
    found = check_memory(lambda: needs(0.75), groups)
    assert found.status == "fault"
    assert found.saw.startswith("2 ranks take about 1.5 GiB, and 0.5 of 1.0 GiB that ")
    assert check_memory(lambda: needs(0.4), groups).status == "warning", "what is taken already may be given back"
    assert check_memory(lambda: needs(0.1), groups).status == "ok"
    assert check_memory(None, groups).saw.startswith("0.5 of 1.0 GiB that ")


def test_the_machine_and_the_gpu_have_limits_too() -> None:
    assert check_memory(lambda: needs(1e6), NO_GROUPS).status == "fault"
    assert check_memory(lambda: needs(0.5), NO_GROUPS, available=GIB // 2).status == "warning"
    assert check_memory(lambda: needs(9, device_gib=8), NO_GROUPS).saw.startswith(
        "a rank takes 9.0 GiB of the GPU's 8.0;"
    )
    assert check_memory(lambda: needs(7, device_gib=8), NO_GROUPS).status == "ok"


def test_the_estimate_is_of_the_ranks_and_checkpoints_of_the_recipe(tmp_path: Path) -> None:
    config = tiny.load(tmp_path, "batch.micro_batch=auto", "batch.accumulation=null", "batch.rows_per_step=8")
    of_two = estimate_needs(config, 2, None)
    assert (of_two.ranks, of_two.device, of_two.num_checkpoints) == (2, "cpu", 4)
    assert 0.1 * GIB < of_two.memory_bytes < 2 * GIB
    assert estimate_needs(config, 1, 8 * GIB).device == "cuda"


def test_ranks_that_would_be_idle_take_nothing(tmp_path: Path) -> None:
    """Where the rows of a step do not divide among all GPUs, a run trains on fewer, and is no fault of the machine."""
    config = tiny.load(tmp_path, "batch.accumulation=null", "batch.rows_per_step=4")
    assert estimate_needs(config, 3, None) == estimate_needs(config, 2, None)
    assert estimate_needs(config, 8, None).ranks == 4


def test_the_estimate_is_of_phases_in_tokens_and_of_epochs_that_nobody_has_counted_too(tmp_path: Path) -> None:
    in_tokens = tiny.load(tmp_path, "phases.main.steps=null", "phases.main.tokens=1024")  # 8 steps of 8 rows of 16
    in_steps = estimate_needs(tiny.load(tmp_path), 2, None)
    assert estimate_needs(in_tokens, 2, None) == in_steps
    in_epochs = estimate_needs(tiny.load(tmp_path, "phases.main.steps=null", "phases.main.epochs=2"), 2, None)
    assert in_epochs.num_checkpoints == 3, "2 that are kept, and the one that is written before another goes"
    assert in_epochs.memory_bytes >= in_steps.memory_bytes, "of a plan that may be long enough to be compiled"


def with_shared_memory(folder: Path, options: str, num_gpus: int) -> Finding:
    mount_tmpfs(folder, options)
    return check_shared_memory(num_gpus, folder)


@needs_namespaces
@pytest.mark.parametrize(
    ("options", "num_gpus", "status", "said"),
    [
        ("size=64k", 0, "fault", "cannot be written: No space left on device"),
        ("ro", 0, "fault", "cannot be written: Read-only file system"),
        ("size=64m", 8, "warning", "64 MiB are free"),
        ("size=64m", 0, "ok", "64 MiB are free"),
    ],
)
def test_shared_memory_that_is_small_or_read_only(
    options: str, num_gpus: int, status: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "shm").mkdir()
    found = find_in_child(tmp_path, with_shared_memory, tmp_path / "shm", options, num_gpus)
    assert found.status == status
    assert said in found.saw


def test_without_shared_memory_there_is_a_fault(tmp_path: Path) -> None:
    assert check_shared_memory(0, tmp_path / "none").status == "fault"
