"""Ranks that count, agree and stop together."""

import inspect
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from smoltrain.distributed import world as world_module
from smoltrain.distributed.world import choose_device, free_port
from smoltrain.errors import Problem, TrainingStopped, UserError
from tests.ranks import world

PROBLEMS = (Problem("too wide", "3", "2", "model.x"), Problem("too long", "5", "4", "batch.y"))


# ---- collectives, on the session's pair of ranks


def sums(per_rank: list[tuple[int, ...]]) -> list[int]:
    here = world()
    return here.sum_ints(*per_rank[here.rank])


def test_integers_add_up_exactly_and_wrap_at_2_to_the_64(ranks: Any) -> None:
    large = 2**62
    mine, yours = (large - 1, 2**63 - 1, -(2**63), 1), (large - 3, 1, -1, True)
    expected = [2**63 - 4, -(2**63), 2**63 - 1, 2]
    assert ranks(2).run(sums, [mine, yours]) == [expected, expected]


def float_sums() -> tuple[list[float], list[float]]:
    here = world()
    return here.sum_floats(1.0 + here.rank, 2.0**-40, float("inf")), here.max_floats(-1.0 - here.rank, here.rank)


def test_floats_add_up_in_fp64_and_the_largest_is_found(ranks: Any) -> None:
    assert ranks(2).run(float_sums) == [([3.0, 2.0**-39, float("inf")], [-1.0, 1.0])] * 2


def every_ranks_numbers() -> list[list[float]]:
    here = world()
    own = torch.tensor([1.0 + here.rank, 2.0**-40, float("inf")], dtype=torch.float64)
    return here.gather_numbers(own).tolist()


def test_numbers_of_every_rank_come_in_the_order_of_the_ranks(ranks: Any) -> None:
    one, two = ranks(2).run(every_ranks_numbers)
    assert one == two == [[1.0, 2.0**-40, float("inf")], [2.0, 2.0**-40, float("inf")]]
    assert ranks(1).run(every_ranks_numbers) == [one[:1]]


def ranks_beside(machines: tuple[int, ...]) -> tuple[int, ...]:
    """Which ranks are on the machine of this rank, where each is on one of these."""
    from smoltrain.distributed import world as module

    return tuple(module._gather_cores_of_this_machine(replace(world(), machines=machines)))


def test_cores_are_those_of_the_own_machine(ranks: Any) -> None:
    assert ranks(2).run(ranks_beside, (0, 1)) == [(0,), (1,)]
    assert ranks(2).run(ranks_beside, (0, 0)) == [(0, 1)] * 2


def place_on_machines() -> tuple[int, tuple[int, ...], tuple[str, ...], bool]:
    here = world()
    return here.local_size, here.machines, here.hosts, here.is_first_of_machine


def test_ranks_of_one_machine_know_it(ranks: Any) -> None:
    name = socket.gethostname()
    expected = [(2, (0, 0), (name, name), True), (2, (0, 0), (name, name), False)]
    assert ranks(2).run(place_on_machines) == expected


def gathered() -> list[Any]:
    here = world()
    return here.gather({"rank": here.rank, "text": "a" * (here.rank * 1000)})


def test_gather_keeps_the_order_of_the_ranks(ranks: Any) -> None:
    for values in ranks(2).run(gathered):
        assert [(value["rank"], len(value["text"])) for value in values] == [(0, 0), (1, 1000)]


def facts() -> tuple[int, int, bool, str]:
    here = world()
    here.barrier()
    return here.rank, here.size, here.is_first, here.device.type


def test_each_rank_knows_its_place(ranks: Any) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert ranks(2).run(facts) == [(0, 2, True, device), (1, 2, False, device)]


def late_barrier(folder: Path) -> bool:
    here = world()
    if here.is_first:
        time.sleep(0.3)
        (folder / "arrived").touch()
    here.barrier()
    return (folder / "arrived").exists()


def test_nobody_leaves_a_barrier_before_all_have_come(ranks: Any, tmp_path: Path) -> None:
    assert ranks(2).run(late_barrier, tmp_path) == [True, True]


def first_works(folder: Path) -> tuple[str, ...]:
    here = world()

    def work() -> tuple[str, ...]:
        (folder / f"rank{here.rank}").touch()
        return (f"rank {here.rank}", f"process {os.getpid()}")

    return here.run_on_first_rank(work)


def test_the_first_works_and_all_have_its_result(ranks: Any, tmp_path: Path) -> None:
    one, two = ranks(2).run(first_works, tmp_path)
    assert one == two
    assert one[0] == "rank 0"
    assert [path.name for path in tmp_path.iterdir()] == ["rank0"]


def first_fails(kind: str) -> tuple[str, str, tuple[Problem, ...]]:
    def work() -> None:
        raise UserError(*PROBLEMS) if kind == "UserError" else TrainingStopped("the loss is nan")

    try:
        world().run_on_first_rank(work)
    except (UserError, TrainingStopped) as error:
        return type(error).__name__, str(error), getattr(error, "problems", ())
    return "nothing", "", ()


def test_the_first_ones_error_is_everybodys(ranks: Any) -> None:
    message = "too wide: saw 3, want 2; change model.x\ntoo long: saw 5, want 4; change batch.y"
    assert ranks(2).run(first_fails, "UserError") == [("UserError", message, PROBLEMS)] * 2
    assert ranks(2).run(first_fails, "TrainingStopped") == [("TrainingStopped", "the loss is nan", ())] * 2
    assert ranks(2).run(sums, [(1,), (2,)]) == [[3], [3]], "the ranks go on together afterwards"


# ---- what needs a process of its own


def environment(**extra: str) -> dict[str, str]:
    """This one without any launcher's words."""
    launcher = ("RANK", "WORLD", "LOCAL_", "MASTER_", "SMOLTRAIN_", "TORCHELASTIC")
    return {k: v for k, v in os.environ.items() if not k.startswith(launcher)} | {"OMP_NUM_THREADS": "1"} | extra


def start(code: str, **extra: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code]
    return subprocess.Popen(
        command, env=environment(**extra), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


WORLD_OF_ONE = """
import os
from smoltrain.distributed.world import open_world
here = open_world()
here.barrier()
print(here.rank, here.size, here.local_rank, here.local_size, here.is_first)
print(here.sum_ints(5, 6), here.sum_floats(0.5), here.max_floats(2.0), here.gather("x"))
print(here.run_on_first_rank(lambda: 7))
print(os.environ["LOCAL_SIZE"])  # DeepSpeed asks `numactl` otherwise
"""


def test_a_bare_python_is_a_world_of_one() -> None:
    out, err = start(WORLD_OF_ONE).communicate(timeout=60)
    assert out.splitlines() == ["0 1 0 1 True", "[5, 6] [0.5] [2.0] ['x']", "7", "1"], err


def test_a_free_port_can_be_listened_on() -> None:
    port = free_port()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))
    assert 1024 <= port < 65536


def test_devices(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends, "mps", SimpleNamespace(is_available=lambda: True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == choose_device("cpu").type == "cpu"
    assert choose_device("mps").type == "mps"
    with pytest.raises(UserError, match=r"no such device: saw cuda, want one of auto, cpu, mps; change engine\.device"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert choose_device("auto", 3, 4) == torch.device("cuda", 3)
    with pytest.raises(UserError, match="no GPU: saw 5 ranks on a machine, 4 GPUs that each of them may use, want a"):
        choose_device("auto", 0, 5)
    assert choose_device("cpu", 0, 5).type == "cpu"


@pytest.mark.parametrize(("device", "backend"), [(torch.device("cuda", 0), "nccl"), (torch.device("cpu"), "gloo")])
def test_the_process_group_is_told_its_gpu(monkeypatch: pytest.MonkeyPatch, device: torch.device, backend: str) -> None:
    signature = inspect.signature(torch.distributed.init_process_group)
    asked: dict[str, Any] = {}

    def note(*words: Any, **named: Any) -> None:
        asked.update(signature.bind(*words, **named).arguments)
        raise InterruptedError

    monkeypatch.setattr(torch.distributed, "init_process_group", note)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(world_module, "choose_device", lambda *_: device)
    monkeypatch.setattr(world_module, "os", SimpleNamespace(environ={}))  # a bare `python`
    with pytest.raises(InterruptedError):
        world_module.open_world()
    assert asked["backend"] == backend
    assert asked["device_id"] == (device if device.type == "cuda" else None)
