"""The CPU: how many cores this process has, who else computes on them, and whether they are slowed down."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from smoltrain.distributed.cgroups import CgroupPlaces, find_cpu_quota
from smoltrain.distributed.cpu_cores import CPUS, usable_cores
from smoltrain.doctor.check import Finding, worst_finding

STAT = Path("/proc/stat")  # man 5 proc: hundredths of a second of each kind
LOOK_S = 1.0  # in which others are watched
BUSY_SHARE = 0.25  # of the cores, from which on others slow a run down
STEAL_SHARE = 0.05  # of the time, that the machine below a virtual one gives to others


def check_threads(environment: Mapping[str, str], cgroups: CgroupPlaces | None = None) -> Finding:
    """Cores, the quota of a container, and the variables that say how many threads compute."""
    cores = len(usable_cores())
    findings: list[Finding] = []
    here = os.cpu_count() or 1
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else here
    saw = f"{cores} cores"
    if bound < here:
        saw = f"{cores} of this machine's cores: bound to {bound} of {here} CPUs (taskset, a launcher, a batch system)"
        if cores == 1:
            findings.append(Finding("warning", saw, "more of them: `taskset -cp PID`, --cpus-per-task of SLURM"))
    quota = find_cpu_quota(cgroups)
    if quota is not None and quota < cores:
        whole = max(1, int(quota))
        advice = f"a whole number for its container (--cpus), or SMOLTRAIN_THREADS={whole} in all ranks together"
        status = "ok" if quota == whole else "warning"
        saw = f"the container may use {quota:g} CPUs of {cores} cores"
        if status == "warning":
            findings.append(Finding("warning", f"{saw}: the kernel stops its threads when they are used up", advice))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "SMOLTRAIN_THREADS"):
        value = environment.get(name, "").split(",")[0]
        if value and not (value.isdecimal() and int(value)):
            findings.append(Finding("fault", f"{name}={value}", f"a whole number from 1 on, or unset {name}"))
        elif value and int(value) > cores:
            saw_threads = f"{name}={value} on {cores} cores: threads wait for each other"
            findings.append(Finding("warning", saw_threads, f"unset {name}; ranks share the cores by themselves"))
    return worst_finding(findings or [Finding("ok", saw)])


class CpuTimes(NamedTuple):
    """Seconds of all CPUs together since the machine was started."""

    busy: float
    stolen: float
    total: float


def read_cpu_times() -> CpuTimes:
    """man 5 proc, /proc/stat: user nice system idle iowait irq softirq steal."""
    numbers = [int(word) / os.sysconf("SC_CLK_TCK") for word in STAT.read_text().splitlines()[0].split()[1:9]]
    idle = numbers[3] + numbers[4]
    return CpuTimes(sum(numbers) - idle, numbers[7], sum(numbers))


def check_neighbours(look_s: float = LOOK_S) -> Finding:
    """Who else computes here, within a second of looking; and what the machine below a virtual one gives to others."""
    before = read_cpu_times()
    own_before_s = time.process_time()
    time.sleep(look_s)
    after = read_cpu_times()
    own_s = time.process_time() - own_before_s
    return judge_neighbours(before, after, own_s, os.getloadavg()[0])


def judge_neighbours(before: CpuTimes, after: CpuTimes, own_s: float, load: float) -> Finding:
    """By two looks at the clocks of the CPUs."""
    total = max(after.total - before.total, 1e-9)
    others = max(0.0, after.busy - before.busy - own_s) / total
    stolen = (after.stolen - before.stolen) / total
    findings: list[Finding] = []
    if stolen > STEAL_SHARE:
        saw = f"the machine below this virtual one takes {stolen:.0%} of the time"
        findings.append(Finding("warning", saw, "another kind of machine, or another time: speeds will swing"))
    if others > BUSY_SHARE:
        saw = f"others use {others:.0%} of the CPUs (load {load:.1f})"
        findings.append(Finding("warning", saw, "`top` names them; end them, or train on fewer ranks"))
    saw = f"others use {others:.0%} of the CPUs (load {load:.1f}), {stolen:.0%} is stolen"
    return worst_finding(findings or [Finding("ok", saw)])


def check_cpu_clocks(cpus: Path = CPUS) -> Finding:
    """Whether the kernel holds the cores back: a governor that saves power, a limit, heat."""
    governors = {path.read_text().strip() for path in cpus.glob("cpu[0-9]*/cpufreq/scaling_governor")}
    lowered: list[float] = []
    for folder in cpus.glob("cpu[0-9]*/cpufreq"):
        allowed = int((folder / "scaling_max_freq").read_text())
        possible = int((folder / "cpuinfo_max_freq").read_text())
        if allowed < 0.9 * possible:
            lowered.append(allowed / possible)
    hot = sum(int(path.read_text()) for path in cpus.glob("cpu[0-9]*/thermal_throttle/core_throttle_count"))
    findings: list[Finding] = []
    if "powersave" in governors and not (cpus / "intel_pstate").is_dir():  # there it is the one that reacts at once
        advice = "`cpupower frequency-set -g performance`"
        findings.append(Finding("warning", "the governor `powersave` keeps the clocks low", advice))
    if lowered:
        saw = f"{len(lowered)} CPUs may run at {min(lowered):.0%} of their clock"
        findings.append(
            Finding("warning", saw, "`cpupower frequency-set -u` the full clock; a power limit of the BIOS?")
        )
    if hot:
        saw = f"heat has slowed cores down {hot:,} times since the machine was started"
        findings.append(Finding("warning", saw, "cooling; fewer ranks if it goes on"))
    if findings:
        return worst_finding(findings)
    if not governors:
        return Finding("ok", "this machine does not tell its clocks, as most virtual ones")
    return Finding("ok", f"governor {', '.join(sorted(governors))}, full clocks, no core was slowed down by heat")
