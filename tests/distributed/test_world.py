"""Ranks that count, agree and stop together."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from smoltrain.distributed.stop import DEEPSPEED_LAUNCHER, STOP_SIGNALS
from smoltrain.distributed.world import free_port
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
from smoltrain.distributed.world import open_world
here = open_world()
here.barrier()
print(here.rank, here.size, here.local_rank, here.local_size, here.is_first)
print(here.sum_ints(5, 6), here.sum_floats(0.5), here.max_floats(2.0), here.gather("x"))
print(here.run_on_first_rank(lambda: 7))
"""


def test_a_bare_python_is_a_world_of_one() -> None:
    out, err = start(WORLD_OF_ONE).communicate(timeout=60)
    assert out.splitlines() == ["0 1 0 1 True", "[5, 6] [0.5] [2.0] ['x']", "7"], err


FLAG = """
import sys, time
from smoltrain.distributed.stop import StopFlag
flag = StopFlag()
print("ready", flag.is_raised(), flush=True)
deadline = time.monotonic() + float(sys.argv[1]) if len(sys.argv) > 1 else time.monotonic() + 30
while not flag.is_raised() and time.monotonic() < deadline:
    time.sleep(0.01)
print(flag.is_raised(), flag.reason, flush=True)
if flag.reason == "SIGINT":
    time.sleep(30)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_raises_the_flag_and_ends_nothing(number: signal.Signals) -> None:
    process = start(FLAG)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready False\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (out, process.returncode) == (f"True {number.name}\n", 0), err


def test_the_second_ctrl_c_leaves_at_once_but_an_echo_of_the_first_does_not() -> None:
    process = start(FLAG)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready False\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "True SIGINT\n"
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.0)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130


LISTEN = "import time\nfrom smoltrain.distributed.stop import StopFlag\nf = StopFlag()\nprint('up', flush=True)\n"


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_before_the_loop_asks_a_signal_just_ends_the_rank(number: signal.Signals) -> None:
    code = LISTEN + "time.sleep(30)"
    process = start(code)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(number)
    process.communicate(timeout=10)
    assert process.returncode == -number


def test_a_request_is_noted_where_the_launchers_launcher_looks(tmp_path: Path) -> None:
    process = start(FLAG, SMOLTRAIN_ASKED=str(tmp_path / "asked"))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready False\n"
    assert not (tmp_path / "asked").exists()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert (tmp_path / "asked").exists()


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    ("launched", "supervisor", "expected"),
    [(True, "dead", "True its launcher is gone"), (True, "the parent", "False"), (False, "dead", "False")],
)
def test_only_a_launched_rank_heeds_its_supervisor(launched: bool, supervisor: str, expected: str) -> None:
    pids = {"dead": str(dead_pid()), "the parent": str(os.getpid())}
    extra = {"SMOLTRAIN_SUPERVISOR": pids[supervisor]} | ({"LOCAL_RANK": "0"} if launched else {})
    out, err = start(FLAG.replace("30\n", "0.2\n", 1), **extra).communicate(timeout=30)
    assert out.splitlines()[-1].strip() == expected, err


# Starts a rank that writes what it found to OUT, and ends once it has said that it is up.
LAUNCHER = """
import subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], stdout=subprocess.PIPE, text=True)
rank.stdout.readline()
if "--stay" in sys.argv:
    print("up", flush=True)
    rank.wait()
"""
RUNNER = """
import subprocess, sys
launcher = subprocess.Popen([sys.executable, *sys.argv[1:]])
launcher.wait()
"""
WRITES = FLAG.replace(
    "print(flag.is_raised(), flag.reason, flush=True)", "open(OUT, 'w').write(f'{flag.is_raised()} {flag.reason}\\n')"
)


def found(out: Path) -> str:
    """What the rank wrote."""
    deadline = time.monotonic() + 30
    while not (out.exists() and out.read_text(encoding="utf-8")) and time.monotonic() < deadline:
        time.sleep(0.05)
    return out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("extra", "expected"), [({"LOCAL_RANK": "0"}, "True its launcher is gone\n"), ({}, "False \n")]
)
def test_only_a_launched_rank_notices_that_its_parent_died(
    tmp_path: Path, extra: dict[str, str], expected: str
) -> None:
    out = tmp_path / "out"
    code = WRITES.replace("OUT", repr(str(out)))
    launcher = [sys.executable, "-c", LAUNCHER, code, "1" if not extra else "20"]
    subprocess.run(launcher, env=environment(**extra), check=True, timeout=60)
    assert found(out) == expected


@pytest.mark.parametrize(
    ("module", "expected"), [(DEEPSPEED_LAUNCHER, "True its launcher is gone\n"), ("another", "False \n")]
)
def test_under_deepspeeds_launcher_the_runner_above_it_counts_too(tmp_path: Path, module: str, expected: str) -> None:
    out = tmp_path / "out"
    code = WRITES.replace("OUT", repr(str(out)))
    launcher = ["-c", LAUNCHER, code, "20" if module == DEEPSPEED_LAUNCHER else "1", "--stay", module]
    runner = subprocess.Popen(
        [sys.executable, "-c", RUNNER, *launcher], env=environment(LOCAL_RANK="0"), stdout=subprocess.PIPE, text=True
    )
    assert runner.stdout is not None
    assert runner.stdout.readline() == "up\n"
    runner.kill()
    assert found(out) == expected
    runner.communicate()


def test_before_the_loop_asks_a_rank_leaves_with_its_launcher() -> None:
    code = LISTEN + "time.sleep(60)"
    command = [sys.executable, "-c", LAUNCHER.replace('"up"', "rank.pid"), code, "0", "--stay"]
    launcher = subprocess.Popen(command, env=environment(LOCAL_RANK="0"), stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    rank = psutil.Process(int(launcher.stdout.readline()))
    launcher.kill()
    launcher.communicate()
    with contextlib.suppress(psutil.NoSuchProcess):
        rank.wait(20)


def test_a_rank_that_was_an_orphan_before_it_looked_knows_it(tmp_path: Path) -> None:
    out, script = tmp_path / "out", tmp_path / "rank.py"
    late = "import os, sys, time\nwhile os.getppid() == int(sys.argv[2]): time.sleep(0.01)\n"
    late += "open(sys.argv[3], 'w').write(str(os.getppid()))\n"
    script.write_text(late + WRITES.replace("OUT", repr(str(out))))
    launcher = ["sh", "-c", '"$0" "$1" 20 $$ "$2" & ', sys.executable, str(script), str(tmp_path / "adopter")]
    subprocess.run(launcher, env=environment(LOCAL_RANK="0"), check=True, timeout=60, stdout=subprocess.DEVNULL)
    if found(tmp_path / "adopter") != "1":
        pytest.skip(
            "orphans are adopted by another process than the first here; the tests above kill a launcher that was seen"
        )
    assert found(out) == "True its launcher is gone\n"


def test_a_free_port_can_be_listened_on() -> None:
    port = free_port()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))
    assert 1024 <= port < 65536
