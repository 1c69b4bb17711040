"""A rank that `srun` has started itself, with no launcher between: SLURM's variables in the words of a launcher.

Names and values are those of man 1 srun, "OUTPUT ENVIRONMENT VARIABLES" (22.05). SLURM_NTASKS and SLURM_PROCID are no
sign of a rank: a batch script has them too, and so has every program that it starts without srun.
"""

import os
import re
import sys
from collections.abc import Mapping

STEP_VARIABLES = {  # all of them are there in a task of srun; containers may hide some
    "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "SLURM_STEP_NODELIST",
    "SLURM_STEP_TASKS_PER_NODE", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURMD_NODENAME",
}  # fmt: skip
FIRST_PORT, NUM_PORTS = 20000, 10000  # below those that Linux gives out by itself (man 7 ip, ip_local_port_range)
PORTS_BETWEEN_STEPS = 1000  # steps of one job may run at once, and so may jobs whose numbers are next to each other


def adopt_srun_variables() -> None:
    """Set RANK and the other variables of a launcher, if srun has started this process as one rank of several."""
    if has_terminal():
        return
    if warning := describe_idle_gpus(os.environ):
        print(warning, file=sys.stderr, flush=True)
    os.environ.update(find_srun_variables(os.environ))


def has_terminal() -> bool:
    """Whether a person sits before this process, as in `srun --pty bash` or the shell of `salloc`.

    A task of srun has no controlling terminal, wherever its output goes.
    """
    try:
        os.close(os.open(os.ctermid(), os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def find_srun_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, MASTER_ADDR and so on, as far as they are not set; nothing for a process that is no rank of srun's."""
    if not is_srun_task(environment) or environment["SLURM_STEP_NUM_TASKS"] == "1":
        return {}
    nodes = environment["SLURM_STEP_NODELIST"]
    job = int(environment["SLURM_JOB_ID"])
    step = int(environment["SLURM_STEP_ID"])
    found = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(count_tasks_of_node(environment)),
        "MASTER_ADDR": "127.0.0.1" if environment["SLURM_STEP_NUM_NODES"] == "1" else find_first_host(nodes),
        "MASTER_PORT": str(FIRST_PORT + (job + PORTS_BETWEEN_STEPS * step) % NUM_PORTS),
    }
    return {name: value for name, value in found.items() if name not in environment}


def is_srun_task(environment: Mapping[str, str]) -> bool:
    """Whether this process is a task of the step that the variables tell of, and no other launcher's rank.

    `sbatch` hands on what an earlier step has left in the shell where it was called. It does not fit what slurmd then
    says of the batch script: the tasks of its step on this node (SLURM_GTIDS), and the name of its node 0.
    """
    if "RANK" in environment or not environment.keys() >= STEP_VARIABLES:
        return False
    tasks = environment.get("SLURM_GTIDS")  # MPI programs may want it unset
    if tasks is not None and len(tasks.split(",")) != count_tasks_of_node(environment):
        return False
    is_first_node = environment["SLURM_NODEID"] == "0"
    return not is_first_node or environment["SLURMD_NODENAME"] == find_first_host(environment["SLURM_STEP_NODELIST"])


def count_tasks_of_node(environment: Mapping[str, str]) -> int:
    """Tasks of the step on this node: `2(x3),1` is two on each of three nodes and one on the fourth."""
    counts: list[int] = []
    for tasks, nodes in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment["SLURM_STEP_TASKS_PER_NODE"]):
        counts += [int(tasks)] * int(nodes or 1)
    node = int(environment["SLURM_NODEID"])
    return counts[node] if node < len(counts) else 0


def find_first_host(nodes: str) -> str:
    """The first of some nodes as SLURM writes them, which has task 0: gpu07 of `gpu[07-09,12],login1`."""
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", nodes).partition(",")[0]


def describe_idle_gpus(environment: Mapping[str, str]) -> str | None:
    """A warning where a node has more GPUs than tasks, of which each is a rank and takes one; task 0 says it."""
    gpus = environment.get("SLURM_GPUS_ON_NODE", "")
    if not is_srun_task(environment) or environment["SLURM_PROCID"] != "0" or not gpus.isdecimal():
        return None
    tasks = count_tasks_of_node(environment)
    if int(gpus) <= tasks:
        return None
    node = environment["SLURMD_NODENAME"]
    return (
        f"WARNING: srun has started {tasks} task{'s' * (tasks > 1)} on {node}, which has {gpus} GPUs, and a task takes "
        f"one: --ntasks-per-node={gpus} takes all, or torchrun (launch/slurm.sbatch)"
    )
