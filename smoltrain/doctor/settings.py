"""Environment variables that slow a run down, or that a launcher has left behind."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from smoltrain.distributed.rendezvous import parse_rank_place
from smoltrain.doctor.check import Finding, worst_finding
from smoltrain.errors import RankUserError

ON = r"(?!0$|false$|off$|no$)."  # anything but a plain no


class SlowSetting(NamedTuple):
    """A variable, the values that cost time, and what they do."""

    name: str
    values: str  # a regular expression, from the first letter on
    effect: str


# Sources: torch's docs (cuda_environment_variables, debugging_environment_variables, distributed), NCCL's "Environment
# Variables", Python's "Command line and environment", glibc's "Memory Allocation Tunables".
SLOW_SETTINGS = (
    SlowSetting("CUDA_LAUNCH_BLOCKING", ON, "every kernel waits for the one before"),
    SlowSetting("PYTORCH_NO_CUDA_MEMORY_CACHING", ON, "every tensor asks the driver for memory"),
    SlowSetting("CUBLAS_WORKSPACE_CONFIG", ".", "matmuls are held to fewer algorithms"),
    SlowSetting("TORCH_DISTRIBUTED_DEBUG", "(INFO|DETAIL)", "every collective is checked by another one"),
    SlowSetting("TORCHDYNAMO_DISABLE", ON, "nothing is compiled"),
    SlowSetting("TORCH_COMPILE_DEBUG", ON, "compiling writes all that it does to disk"),
    SlowSetting("PYTORCH_JIT", "0", "scripted functions are interpreted"),
    SlowSetting("NCCL_DEBUG", "(INFO|TRACE)", "NCCL writes down what it does"),
    SlowSetting("NCCL_P2P_DISABLE", ON, "GPUs do not reach each other's memory"),
    SlowSetting("NCCL_SHM_DISABLE", ON, "ranks of a machine talk over its network"),
    SlowSetting("NCCL_IB_DISABLE", ON, "InfiniBand is left alone: TCP takes its place"),
    SlowSetting("TRITON_INTERPRET", ON, "kernels are interpreted, in Python"),
    SlowSetting("ONEDNN_VERBOSE", "[1-9a-z]", "every CPU kernel prints a line"),
    SlowSetting("MKL_VERBOSE", "[1-9]", "every matmul prints a line"),
    SlowSetting("OMP_WAIT_POLICY", "(?i:active)", "waiting threads keep cores busy that others need"),
    SlowSetting("MALLOC_CHECK_", "[1-9]", "every piece of memory is checked"),
    SlowSetting("MALLOC_PERTURB_", "[1-9]", "every piece of memory is written over"),
    SlowSetting("PYTHONMALLOC", "(malloc_)?(debug|malloc)|pymalloc_debug", "every piece of Python's memory is checked"),
    SlowSetting("PYTHONDEVMODE", ON, "Python checks itself"),
    SlowSetting("PYTHONTRACEMALLOC", "[1-9]", "Python notes where each piece of memory is from"),
    SlowSetting("LD_PRELOAD", r".*lib(asan|tsan|ubsan|lsan)", "a sanitizer checks every access to memory"),
)


def check_slow_settings(environment: Mapping[str, str]) -> Finding:
    """Variables that make every step slower, which somebody has set for another purpose."""
    findings: list[Finding] = []
    for setting in SLOW_SETTINGS:
        value = environment.get(setting.name, "")
        if value and re.match(setting.values, value):
            advice = f"unset {setting.name}, unless you are after a fault"
            findings.append(Finding("warning", f"{setting.name}={value}: {setting.effect}", advice))
    return worst_finding(findings or [Finding("ok", f"none of {len(SLOW_SETTINGS)} variables that cost time is set")])


def check_launcher_settings(environment: Mapping[str, str]) -> Finding:
    """Variables by which a launcher tells ranks who they are: left over, they make one process wait for others."""
    try:
        place = parse_rank_place(environment)
    except RankUserError as error:
        [problem] = error.problems
        return Finding("fault", f"{problem.what}: {problem.saw}", f"want {problem.want}; change {problem.change}")
    if place.size > 1:
        saw = f"RANK={place.rank} of WORLD_SIZE={place.size}: a run would wait for the other ranks"
        return Finding("warning", saw, "unset RANK and WORLD_SIZE, if no launcher starts the run")
    return Finding("ok", "no launcher has left RANK or WORLD_SIZE behind")
