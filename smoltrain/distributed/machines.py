"""Which ranks are on one machine, as its kernel tells: host names may be equal (cloned images), and some launchers do
not say how many ranks a machine has.
"""

import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # man 4 random: drawn anew at each boot
PID_NAMESPACE = Path("/proc/self/ns/pid")  # of a container; processes of two see no files of each other


@dataclass(frozen=True)
class RankFacts:
    """What a rank tells all others before there is a group."""

    host: str
    kernel: str  # the same for processes that can see each other
    first_of_node: int | None  # the first rank of what its launcher calls a node; None where the launcher tells nothing
    local_rank: int | None  # likewise
    address: str  # of its machine on the way to rank 0; "" if there is no way

    def to_text(self) -> str:
        """For a store."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_text(text: str) -> "RankFacts":
        """The inverse."""
        return RankFacts(**json.loads(text))


def identify_kernel() -> str:
    """What two processes have in common if they are on one machine, and not in two containers of it."""
    try:
        return f"{BOOT_ID.read_text().strip()} {os.readlink(PID_NAMESPACE)}"  # noqa: PTH115 - it leads to no file
    except OSError:  # macOS
        return socket.gethostname()


def number_machines(facts: list[RankFacts]) -> tuple[int, ...]:
    """The machine of each rank; machines are counted from 0 in the order of their first ranks.

    Copies of a machine that was running (snapshots) have one boot id. No launcher gives one local rank out twice on one
    machine, so ranks that have the same are on two: those of each node then belong together.
    """
    doubtful: set[str] = set()
    seen: set[tuple[str, int]] = set()
    for fact in facts:
        if fact.local_rank is None:
            continue
        place = (fact.kernel, fact.local_rank)
        if place in seen:
            doubtful.add(fact.kernel)
        seen.add(place)
    numbers: dict[tuple[str, int | None], int] = {}
    machines: list[int] = []
    for fact in facts:
        key = (fact.kernel, fact.first_of_node if fact.kernel in doubtful else None)
        machines.append(numbers.setdefault(key, len(numbers)))
    return tuple(machines)


def name_machines(facts: list[RankFacts], machines: tuple[int, ...]) -> tuple[str, ...]:
    """The name of each rank's machine, with its address where two have the same name."""
    machines_of_name: dict[str, set[int]] = {}
    for fact, machine in zip(facts, machines, strict=True):
        machines_of_name.setdefault(fact.host, set()).add(machine)
    names: list[str] = []
    for fact, machine in zip(facts, machines, strict=True):
        is_shared = len(machines_of_name[fact.host]) > 1
        names.append(f"{fact.host} ({fact.address or f'machine {machine}'})" if is_shared else fact.host)
    return tuple(names)
