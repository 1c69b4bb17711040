"""What SLURM's variables say of a process; the values are those that SLURM 22.05 gives.

tests/whole_runs/test_real_slurm.py asks a real one.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from smoltrain import cli
from smoltrain.distributed import srun
from smoltrain.distributed.rendezvous import RankPlace, parse_rank_place
from smoltrain.distributed.srun import describe_idle_gpus, find_first_host, find_srun_variables
from smoltrain.errors import BAD_INPUT
from smoltrain.launch.rank import run_rank
from tests.terminals import TerminalSession

# Of `sbatch --nodes=2 --ntasks-per-node=2`: what the batch script has, and what a step in it adds.
BATCH = {
    "SLURM_JOB_ID": "4711", "SLURM_NTASKS": "4", "SLURM_NPROCS": "4", "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[0-1]", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0", "SLURM_GTIDS": "0", "SLURMD_NODENAME": "n0",
}  # fmt: skip
STEP = BATCH | {
    "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "n[0-1]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}  # fmt: skip
FIRST = STEP | {"SLURM_GTIDS": "0,1"}
LAST = STEP | {
    "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_GTIDS": "2,3", "SLURMD_NODENAME": "n1",
}  # fmt: skip
ONE_TASK = FIRST | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_GTIDS": "0"}
ONE_NODE = FIRST | {
    "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_STEP_NODELIST": "n0",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (FIRST, RankPlace(0, 4, 0, 2, "n0", 24711)),
        (LAST, RankPlace(3, 4, 1, 2, "n0", 24711)),
        (ONE_NODE, RankPlace(0, 2, 0, 2, "127.0.0.1", 24711)),
        (LAST | {"SLURM_STEP_ID": "2", "SLURM_JOB_ID": "18000"}, RankPlace(3, 4, 1, 2, "n0", 20000)),
        (LAST | {"SLURM_STEP_TASKS_PER_NODE": "1,2,1"}, RankPlace(3, 4, 1, 2, "n0", 24711)),
        (LAST | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "5"}, RankPlace(3, 4, 1, 2, "10.0.0.7", 5)),
        (LAST | {"WORLD_SIZE": "4"}, RankPlace(3, 4, 1, 2, "n0", 24711)),  # as scripts for other trainers export it
        ({key: value for key, value in LAST.items() if key != "SLURM_GTIDS"}, RankPlace(3, 4, 1, 2, "n0", 24711)),
    ],
)  # fmt: skip
def test_a_task_of_srun_is_a_rank(environment: dict[str, str], expected: RankPlace) -> None:
    assert parse_rank_place(environment | find_srun_variables(environment)) == expected


@pytest.mark.parametrize(
    "environment",
    [
        {}, BATCH, ONE_TASK,
        STEP,  # a batch script that was submitted in a step with two tasks on a node
        STEP | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_STEP_NODELIST": "n[7-9,12]"},  # of another job's nodes
        LAST | {"RANK": "0"},  # torchrun's, which srun has started
        {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"},  # what a container has left of them
    ],
)  # fmt: skip
def test_what_srun_has_not_started_as_one_of_several_is_no_rank_of_its(environment: dict[str, str]) -> None:
    assert find_srun_variables(environment) == {}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n0", "n0"), ("n[0-1]", "n0"), ("gpu[07-09,12],login1", "gpu07"), ("b,a", "b"), ("r[1-2]n[03-04]", "r1n03")],
)
def test_the_first_of_a_list_of_nodes(nodes: str, first: str) -> None:
    assert find_first_host(nodes) == first


def test_gpus_that_no_task_takes_are_named_once() -> None:
    said = describe_idle_gpus(LAST | {"SLURM_PROCID": "0", "SLURM_GPUS_ON_NODE": "8"})
    assert said
    assert said.startswith("WARNING: srun has started 2 tasks on n1, which has 8 GPUs, and a task takes one: --ntasks")
    assert describe_idle_gpus(ONE_TASK | {"SLURM_GPUS_ON_NODE": "8"}) is not None
    assert describe_idle_gpus(FIRST | {"SLURM_GPUS_ON_NODE": "2"}) is None
    assert describe_idle_gpus(LAST | {"SLURM_GPUS_ON_NODE": "8"}) is None, "task 0 has said it"
    assert describe_idle_gpus(FIRST | {"SLURM_GPUS_ON_NODE": "8", "RANK": "3"}) is None, "torchrun's takes one too"


ADOPT = """
import os
from smoltrain.distributed.srun import adopt_srun_variables
adopt_srun_variables()
open("rank", "w").write(os.environ.get("RANK", "none"))
"""


def test_whoever_sits_at_a_terminal_is_no_rank(tmp_path: Path) -> None:
    """`srun --ntasks=4 --pty bash` gives its shell the variables of a task; input and output may be redirected."""
    program = [sys.executable, "-c", ADOPT]
    subprocess.run(program, cwd=tmp_path, env=os.environ | LAST, check=True, start_new_session=True)
    assert (tmp_path / "rank").read_text() == "3"
    shell = ["/bin/sh", "-c", '"$@" </dev/null >/dev/null 2>&1', "sh", *program]
    assert TerminalSession(shell, tmp_path, 80, 24, **LAST).finish() == 0
    assert (tmp_path / "rank").read_text() == "none"


def run_check_hosts(words: list[str]) -> int:
    try:
        cli.main(["check-hosts", *words])
    except SystemExit as left:
        return int(left.code or 0)
    return 0


@pytest.mark.parametrize("start", [run_rank, run_check_hosts])
def test_training_and_check_hosts_need_no_launcher_under_srun(
    start: Callable[[list[str]], int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "environ", os.environ | LAST | {"SLURM_PROCID": "2", "SLURM_LOCALID": "0"})
    monkeypatch.setattr(srun, "has_terminal", lambda: False)
    assert start(["quickstart", "model.hidden_size=33"]) == BAD_INPUT
    assert "the heads do not divide the width: saw 33" in capsys.readouterr().err, "the first rank of n1 says it"
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("2", "4")
