"""What is said of ranks that are gone, and by whom."""

import pytest

from smoltrain.distributed.verdict import ENDED, UNHEARD, Verdict, find_speaker, judge_loss
from smoltrain.errors import FAULT

MACHINES = (0, 0, 1, 1, 2)
HOSTS = ("n0", "n0", "n1", "n1", "n2")


@pytest.mark.parametrize(
    ("fates", "said", "gone"),
    [
        ({3: ENDED}, "rank 3 on n1 is lost: the process has ended; ", (3,)),
        ({3: ENDED, 2: ENDED}, "ranks 2, 3 on n1 are lost: the process has ended; ", (2, 3)),
        ({3: UNHEARD}, "n1 (ranks 2, 3) has not been heard for 45 s: its power or its network is gone; ", (2, 3)),
        ({4: UNHEARD, 1: ENDED}, "n0 and n2 (ranks 1, 4) have not been heard for 45 s: their power", (1, 4)),
    ],
)
def test_a_loss_names_ranks_and_hosts(fates: dict[int, str], said: str, gone: tuple[int, ...]) -> None:
    verdict = judge_loss(fates, MACHINES, HOSTS, 45.0)
    assert verdict.text.startswith(said)
    assert (verdict.gone, verdict.code, verdict.kind) == (gone, FAULT, "lost")


@pytest.mark.parametrize(
    ("verdict", "speakers"),
    [
        (Verdict(FAULT, "", (2,), "lost"), [0, 3, 4]),
        (Verdict(FAULT, "", (2, 3), "lost"), [0, None, 4]),
        (Verdict(FAULT, "", (4,), "failed"), [0, 2, None]),
        (Verdict(FAULT, "", (0,), "failed"), [None, 2, 4]),  # rank 0 has said it
        (Verdict(FAULT, "", (0,), "lost"), [1, 2, 4]),
    ],
)
def test_one_rank_of_each_machine_speaks(verdict: Verdict, speakers: list[int | None]) -> None:
    assert [find_speaker(verdict, MACHINES, machine) for machine in range(3)] == speakers
