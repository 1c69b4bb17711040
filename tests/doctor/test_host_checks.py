"""What is made of what the machines say; on real hosts: tests/doctor/test_hosts.py."""

import re
from collections.abc import Callable

import pytest

from smoltrain.doctor import host_checks
from smoltrain.doctor.host_checks import describe_odd, judge_clocks, judge_links, multiply_known_matrices
from smoltrain.doctor.links import HostLink
from tests.ranks import Ranks, world


def test_the_odd_one_is_named() -> None:
    assert describe_odd({"n0": "2.13", "n1": "2.13"}) is None
    assert describe_odd({"n0": "2.13", "n1": "2.12", "n2": "2.13"}) == "n1 has 2.12; the other 2 have 2.13"
    assert describe_odd({"n0": "2.13", "n1": "2.12"}) == "n1 has 2.12; n0 has 2.13"


@pytest.mark.parametrize(
    ("offsets", "status", "said"),
    [
        ({"n0": (0.0, 0.0), "n1": (0.3, 0.1)}, "ok", "at most 400.0 ms apart"),
        ({"n0": (0.0, 0.0), "n1": (-3.0, 0.1)}, "warning", "n1 is 3.0 s behind n0"),
        ({"n0": (0.0, 0.0), "n1": (3.0, 2.5)}, "ok", "at most 5,500.0 ms apart"),
        ({"n0": (0.0, 0.0), "n1": (3600.0, 0.1), "n2": (0.0, 0.1)}, "fault", "n1 is 3,600.0 s ahead of most others"),
        ({"n0": (0.0, 0.0), "n1": (7.0, 0.1), "n2": (7.0, 0.1)}, "warning", "n0 is 7.0 s behind most others"),
        ({}, "ok", "at most 0.0 ms apart"),
    ],
)
def test_clocks_that_are_apart(offsets: dict[str, tuple[float, float]], status: str, said: str) -> None:
    found = judge_clocks(offsets)
    assert (found.status, found.saw) == (status, said)


def test_slow_links() -> None:
    def name(ranks: list[int]) -> str:
        return ", ".join(f"n{rank}" for rank in ranks)

    fast, slow, late = HostLink(1e-4, 1e9), HostLink(1e-4, 1e7), HostLink(0.1, 1e9)
    odd = judge_links({(0, 1): fast, (0, 2): slow, (1, 2): slow}, name)
    assert (odd.status, odd.saw.partition(":")[0]) == ("warning", "n2 is slower than the others")
    odd = judge_links({(0, 1): late, (0, 2): fast, (1, 2): late}, name)
    assert odd.saw.startswith("n1 is slower than the others: ")
    of_two = judge_links({(0, 1): slow}, name)
    assert (of_two.status, of_two.saw) == (
        "warning", "slow for ordinary Ethernet: 0.08 Gbit/s at least (n0 and n1), 0.10 ms at most (n0 and n1)",
    )  # fmt: skip
    assert "--between 0.08gbit" in of_two.advice
    assert judge_links({(0, 1): fast}, name).status == "ok"


def find_with_wrong_products() -> tuple[bool, str, str]:
    own = world()
    _, is_right = multiply_known_matrices(own)
    host_checks.multiply_known_matrices = lambda world: (1.0, world.rank != 1)
    try:
        found = host_checks.check_compute(own)
    finally:
        host_checks.multiply_known_matrices = multiply_known_matrices
    return is_right, found.status, found.saw


def test_a_rank_that_computes_wrong_is_named(ranks: Callable[[int], Ranks]) -> None:
    for is_right, status, saw in ranks(2).run(find_with_wrong_products):
        assert is_right
        assert status == "fault"
        assert re.fullmatch(r"rank 1 on \S+ multiplies wrong", saw)
