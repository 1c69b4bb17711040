"""A real SLURM: a controller and two nodes, each a host of its own (tests/hosts.py), of Debian's packages.

    with make_slurm(folder) as slurm:
        job = slurm.submit("launch/slurm.sbatch", "quickstart", ...)
        slurm.wait_for(job, "RUNNING")

Every daemon is a process of a host, in the foreground: it ends with its host, however a test ends. Nothing of the
machine's own SLURM, if it has one, is touched: configuration, key, sockets and state are in `folder`.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests import launches
from tests.hosts import Hosts, make_hosts, why_no_hosts

CONTROLLER = 2  # nodes are the hosts 0 and 1
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
GPUS = 2  # of a node, as SLURM counts them: null devices
# man 5 slurm.conf. A job that is queued again may start when its credential has expired: cred_expire.
CONF = """
ClusterName=smoltrain
SlurmctldHost=n2
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/completed
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
LaunchParameters=use_interactive_step
MpiDefault=none
ReturnToService=2
SlurmdTimeout=20
KillWait=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=n[0-1] CPUs=8 RealMemory=4000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes=n[0-1] Default=YES PriorityTier=1
PartitionName=urgent Nodes=n[0-1] PriorityTier=10 PreemptMode=OFF
"""


def why_no_slurm() -> str | None:
    """The reason why SLURM cannot be run here, or None."""
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    return f"no {missing[0]} here (Debian packages slurm-wlm and munge)" if missing else why_no_hosts()


class Slurm:
    """Its daemons, and the commands of a user at the controller."""

    def __init__(self, hosts: Hosts, folder: Path, daemons: list[subprocess.Popen[str]]) -> None:
        """`daemons` gets what is started, for who is to wait for their end."""
        self.hosts = hosts
        self.folder = folder
        self._daemons = daemons
        self._environment = launches.environment() | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._write_files()
        files = [f"--{kind}-file={folder}/munge.{kind}" for kind in ("key", "pid", "log", "seed")]
        self._start(CONTROLLER, "munged", "--foreground", "--force", f"--socket={folder}/munge", *files)
        launches.wait_until((folder / "munge").exists)
        self._start(CONTROLLER, "slurmctld", "-D", "-c")
        self.start_node(0)
        self.start_node(1)
        launches.wait_until(lambda: self.ask("sinfo", "-h", "-o", "%D %T") == "2 idle")

    def _write_files(self) -> None:
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        (self.folder / "slurm.conf").write_text(CONF.format(folder=self.folder, gpus=GPUS))
        for number in range(GPUS):
            os.mknod(self.folder / f"gpu{number}", 0o20666, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(f"NodeName=n[0-1] Name=gpu File={self.folder}/gpu[0-{GPUS - 1}]\n")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=autodetect\nIgnoreSystemd=yes\n")

    def _start(self, number: int, *command: str) -> None:
        with (self.folder / f"{command[0]}.n{number}.log").open("a") as log:
            self._daemons.append(
                self.hosts.run(number, *command, stdout=log, stderr=subprocess.STDOUT, env=self._environment)
            )

    def start_node(self, number: int) -> None:
        """Its daemon, at first and after it was off."""
        self._start(number, "slurmd", "-D", "-N", f"n{number}")

    def processes(self) -> list[int]:
        """Those of nsenter, each of which ends with its daemon."""
        return [daemon.pid for daemon in self._daemons]

    def ask(self, *command: str, **environment: str) -> str:
        """What one of SLURM's commands prints, at the controller."""
        run = self.hosts.run(
            CONTROLLER, *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=self._environment | environment,
        )  # fmt: skip
        return run.communicate(timeout=60)[0].strip()

    def submit(self, *words: str, **environment: str) -> str:
        """The number of the job that sbatch makes of these words."""
        said = self.ask("sbatch", "--parsable", *words, **environment)
        assert said.isdecimal(), said
        return said

    def state(self, job: str) -> str:
        """As `squeue` names it, also of a job that has ended."""
        return self.ask("squeue", "-h", "-j", job, "--states=all", "-o", "%T")

    def show(self, job: str) -> dict[str, str]:
        """What scontrol knows of a job."""
        words = self.ask("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, job: str, state: str, seconds: float = 300) -> None:
        """Return when a job is in a state. Errors: AssertionError with what SLURM knows of it."""
        with contextlib.suppress(AssertionError):
            launches.wait_until(lambda: self.state(job) == state, seconds)
        assert self.state(job) == state, self.ask("scontrol", "show", "job", job)


@contextlib.contextmanager
def make_slurm(folder: Path) -> Iterator[Slurm]:
    """A SLURM of two nodes, whose files are in `folder`, until the end of the block."""
    with contextlib.ExitStack() as kept:
        daemons: list[subprocess.Popen[str]] = []
        kept.callback(lambda: [daemon.wait(30) for daemon in daemons])  # their hosts are gone by then
        yield Slurm(kept.enter_context(make_hosts(3, folder)), folder, daemons)
