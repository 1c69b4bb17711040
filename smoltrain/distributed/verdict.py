"""Why no rank can go on, in one line, and which rank of each machine says it."""

from dataclasses import dataclass
from typing import Literal

from smoltrain.errors import FAULT

ENDED = "ended"  # its process, as its kernel says
UNHEARD = "unheard"  # its machine does not answer


@dataclass(frozen=True)
class Verdict:
    """The same for every rank."""

    code: int  # of errors.py
    text: str  # one line, or one for each problem
    gone: tuple[int, ...]  # the ranks that are lost, or the one that failed
    kind: Literal["lost", "failed"]  # lost: gone without a word; failed: it has said why


def judge_loss(fates: dict[int, str], machines: tuple[int, ...], hosts: tuple[str, ...], lost_host_s: float) -> Verdict:
    """What is to be said of ranks that are gone without a word; a machine that does not answer takes all of its along.

    `fates` is ENDED or UNHEARD by rank, `machines` and `hosts` are the number and the name of each rank's machine.
    """
    gone = set(fates)
    silent = {machines[rank] for rank, fate in fates.items() if fate == UNHEARD}
    gone |= {rank for rank, machine in enumerate(machines) if machine in silent}
    names = " and ".join(sorted({hosts[rank] for rank in gone}))
    ranks = f"rank{'s' * (len(gone) > 1)} {', '.join(map(str, sorted(gone)))}"
    if silent:
        has = "have" if " and " in names else "has"
        its = "their" if " and " in names else "its"
        what = f"{names} ({ranks}) {has} not been heard for {lost_host_s:g} s: {its} power or {its} network is gone"
    else:
        what = f"{ranks} on {names} {'are' if len(gone) > 1 else 'is'} lost: the process has ended"
    text = f"{what}; the same command goes on from the last checkpoint"
    return Verdict(FAULT, text, tuple(sorted(gone)), "lost")


def find_speaker(verdict: Verdict, machines: tuple[int, ...], machine: int) -> int | None:
    """The rank that says it on a machine: the lowest one that is there. None where rank 0 has said it of itself."""
    if verdict.kind == "failed" and verdict.gone == (0,) and machine == machines[0]:
        return None
    here = [rank for rank, other in enumerate(machines) if other == machine and rank not in verdict.gone]
    return here[0] if here else None
