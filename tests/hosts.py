"""Several machines on this one: network, host name, process ids, mounts and boot id of their own, one file system.

    with make_hosts(2, folder) as hosts:
        life = hosts.train([*words], folder / "log")
        hosts.power_off(1)

Each host is a process in namespaces (man 7 namespaces) that it keeps alive; a bridge in one more connects them. They
end with that process, and it ends with this one: nothing is left behind, however a test ends. Ranks are forked from the
zygote, which has imported the product, and enter their host.
"""

import contextlib
import ctypes
import functools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from tests.zygote import PR_SET_PDEATHSIG, Life, zygote

NET = "10.77.0"
PORT = "29577"  # of rank 0's store, in a network of its own
NAMESPACES = ("ipc", "uts", "net", "pid", "mnt")  # setns(2); the last one changes what /proc shows
Names = Literal["own", "loopback", "none"]  # what a host's own name resolves to: its address, 127.0.1.1, nothing


TRIAL = "ip link add br0 type bridge; ip link add one type veth peer name two"  # a kernel may have neither


@functools.cache
def why_no_hosts() -> str | None:
    """The reason why namespaces cannot be made here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program in ("ip", "unshare", "nsenter", "setpriv"):
        if not shutil.which(program):
            return f"no {program} here (Debian packages iproute2 and util-linux)"
    words = ["unshare", "--net", "--pid", "--mount", "--fork", "sh", "-ec", TRIAL]
    tried = subprocess.run(words, capture_output=True, check=False)
    return None if tried.returncode == 0 else f"namespaces are not allowed here: {tried.stderr.decode().strip()}"


class Hosts:
    """Some machines n0, n1, ... at 10.77.0.10, 10.77.0.11, ..., all on one switch."""

    def __init__(self, count: int, folder: Path, names: Names, same_name: bool) -> None:
        self.count = count
        self._folder = folder
        self._names = names
        self._same_name = same_name
        self._private: list[Path] = []
        self._switch = _start_namespaces("--net")
        self._keepers: list[int] = []  # the first process of each host, by its number outside
        _enter(self._switch, "net", "ip link add br0 type bridge && ip link set br0 up && ip link set lo up")
        for number in range(count):
            self._keepers.append(self._boot(number))

    def _boot(self, number: int) -> int:
        keeper = _start_namespaces("--net", "--uts", "--ipc", "--pid", "--mount", "--mount-proc")
        hosts_file = self._folder / f"hosts.{number}"
        hosts_file.write_text(self._hosts_text(number))
        boot_id = self._folder / f"boot_id.{number}"
        boot_id.write_text(f"{number:08d}-0000-4000-8000-000000000000\n")
        name = "clone" if self._same_name else f"n{number}"
        _enter(self._switch, "net", f"ip link del sw{number} 2>/dev/null || true")  # of its life before
        cable = f"ip link add sw{number} type veth peer name eth0 netns {keeper}"
        _enter(self._switch, "net", f"{cable} && ip link set sw{number} master br0 up")
        _enter(
            keeper, "net,uts,ipc,pid,mount",
            f"ip addr add {NET}.{10 + number}/24 dev eth0 && ip link set lo up && ip link set eth0 up",
            f"hostname {name} && mount -t tmpfs tmpfs /dev/shm",
            f"mount --bind {hosts_file} /etc/hosts && mount --bind {boot_id} /proc/sys/kernel/random/boot_id",
        )  # fmt: skip
        return keeper

    def _hosts_text(self, number: int) -> str:
        """/etc/hosts of one host."""
        lines = ["127.0.0.1 localhost"]
        if self._names == "loopback":
            lines.append(f"127.0.1.1 n{number} clone")
        for other in range(self.count):
            if other != number or self._names == "own":
                lines.append(f"{NET}.{10 + other} n{other}" + (" clone" if other == number else ""))
        return "\n".join(lines) + "\n"

    def hide(self, path: Path) -> None:
        """From now on each host sees a folder of its own at `path`."""
        for number in range(self.count):
            self.hide_on(number, path)

    def hide_on(self, number: int, path: Path) -> None:
        """From now on this host alone sees a folder of its own at `path`."""
        own = self._folder / f"private.{number}{path}"
        own.mkdir(parents=True, exist_ok=True)  # the disk of an earlier life
        path.mkdir(parents=True, exist_ok=True)
        _enter(self._keepers[number], "mount", f"mount --bind {own} {path}")

    def cut_cable(self, number: int) -> None:
        """Nothing reaches this host any more, nor leaves it; its processes live."""
        _enter(self._switch, "net", f"ip link set sw{number} down")

    def slow_down(self, number: int, rate: str) -> None:
        """This host sends no more than `rate`, as in 20mbit (man 8 tc-tbf)."""
        shape = f"tc qdisc add dev eth0 root tbf rate {rate} burst 64kb latency 1s"
        _enter(self._keepers[number], "net", shape)

    def power_off(self, number: int) -> None:
        """The cable first, so that no FIN and no RST reaches anybody, then all processes at once."""
        self.cut_cable(number)
        os.kill(self._keepers[number], signal.SIGKILL)

    def keepers(self) -> list[int]:
        """The processes that keep hosts and switch alive."""
        return [*self._keepers, self._switch]

    def kill_ranks(self, number: int) -> None:
        """All processes of this host but its first are killed: their connections are closed, as the kernel lives."""
        self._signal_ranks(number, "KILL")

    def stop_ranks(self, number: int) -> None:
        """They stand still."""
        self._signal_ranks(number, "STOP")

    def resume_ranks(self, number: int) -> None:
        """They go on."""
        self._signal_ranks(number, "CONT")

    def _signal_ranks(self, number: int, name: str) -> None:
        others = f"for n in /proc/[0-9]*; do n=${{n#/proc/}}; [ $n = 1 ] || [ $n = $$ ] || kill -{name} $n; done"
        _enter(self._keepers[number], "pid,mount", others)

    def power_on(self, number: int) -> None:
        """A host that was off is booted anew."""
        self._keepers[number] = self._boot(number)

    def fork(
        self, log: Path, function: Callable[..., int | None], *args: Any, per_host: int = 1,
        environment: dict[str, str] | None = None, without: tuple[str, ...] = (), on: tuple[int, ...] | None = None,
    ) -> Life:  # fmt: skip
        """function(*args) on `per_host` ranks of each host, or of those it is to be `on`.

        They find the variables of a launcher but `without`.
        """
        numbers = on or tuple(range(self.count))
        size = len(numbers) * per_host
        places: list[tuple[int, dict[str, str]]] = []
        for number in numbers:
            for local_rank in range(per_host):
                own = {"LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(per_host)}
                places.append((self._keepers[number], own))
        common = {"MASTER_ADDR": "n0", "MASTER_PORT": PORT} | (environment or {})
        return zygote().fork(size, log, _run_on_host, places, common, without, str(Path.cwd()), function, args)

    def run(self, number: int, *command: str, **how: Any) -> subprocess.Popen[str]:
        """A program of its own on one host."""
        kinds = [*(f"--{kind}" for kind in ("net", "uts", "ipc", "pid", "mount")), f"--wdns={Path.cwd()}"]
        return subprocess.Popen(["nsenter", "-t", str(self._keepers[number]), *kinds, "--", *command], text=True, **how)

    def start_sshd(self) -> None:
        """From now on root on one host may log in on every other, by a key that is here alone."""
        keys = self._folder / "ssh"
        keys.mkdir(mode=0o700)
        for name in ("id_ed25519", "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", keys / name], check=True)
        (keys / "authorized_keys").write_bytes((keys / "id_ed25519.pub").read_bytes())
        (keys / "config").write_text("StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n")
        for file in keys.iterdir():
            file.chmod(0o600)
        options = "-o UsePAM=no -o PidFile=none -o PermitRootLogin=yes -o StrictModes=no"
        for keeper in self._keepers:
            _enter(
                keeper, "net,uts,ipc,pid,mount", f"mkdir -p /root/.ssh /run/sshd && mount --bind {keys} /root/.ssh",
                f"{shutil.which('sshd')} -f /dev/null -h {keys / 'host_key'} {options}",
            )  # fmt: skip

    def train(self, words: list[str], log: Path, **how: Any) -> Life:
        """Ranks of launch/train.py on these hosts."""
        return self.fork(log, _train_rank, words, **how)

    def close(self) -> None:
        """All of it away."""
        for keeper in self.keepers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(keeper, signal.SIGKILL)


@contextlib.contextmanager
def make_hosts(count: int, folder: Path, *, names: Names = "own", same_name: bool = False) -> Iterator[Hosts]:
    """So many hosts, whose files are in `folder`, until the end of the block."""
    hosts: Hosts | None = None
    try:
        hosts = Hosts(count, folder, names, same_name)
        yield hosts
    finally:
        if hosts:
            hosts.close()


def _start_namespaces(*kinds: str) -> int:
    """A process that sleeps in new namespaces: its id here. It ends when this process does."""
    sleep = "trap '' CHLD; exec sleep infinity"  # as init of its host it reaps orphans
    command = ["setpriv", "--pdeathsig", "KILL", "unshare", *kinds, "--fork", "--kill-child=KILL", "sh", "-c", sleep]
    outer = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        child = children.read_text().split()
        if child and Path(f"/proc/{child[0]}/comm").read_text().strip() == "sleep":
            _reaped.append(outer)
            return int(child[0])
        time.sleep(0.01)
    outer.kill()
    raise TimeoutError("no namespaces")


_reaped: list[subprocess.Popen[bytes]] = []  # so that no ResourceWarning is of them


def _enter(pid: int, kinds: str, *scripts: str) -> None:
    """Run a line of sh in the namespaces of a process. Errors: AssertionError with what it said."""
    flags = [f"--{kind}" for kind in kinds.split(",")]
    command = ["nsenter", "-t", str(pid), *flags, "--", "sh", "-ec", "\n".join(scripts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _run_on_host(
    places: list[tuple[int, dict[str, str]]], common: dict[str, str], without: tuple[str, ...], folder: str,
    function: Callable[..., int | None], args: tuple[Any, ...],
) -> int:  # fmt: skip
    """Enter the host of this rank, and be the rank there, in a child, as only children enter a pid namespace."""
    keeper, own = places[int(os.environ["RANK"])]
    os.environ.update(common | own)
    for name in without:
        del os.environ[name]
    libc = ctypes.CDLL(None, use_errno=True)
    handles = [os.open(f"/proc/{keeper}/ns/{kind}", os.O_RDONLY) for kind in NAMESPACES]
    for handle in handles:
        if libc.setns(handle, 0):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(handle)
    if pid := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return code if code >= 0 else 128 - code
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.chdir(folder)
    return function(*args) or 0


def _train_rank(words: list[str]) -> int:
    from smoltrain.launch.rank import run_rank

    return run_rank(["quickstart", *words])
