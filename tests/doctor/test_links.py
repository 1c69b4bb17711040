"""Links between machines: who is paired with whom, and who is slow."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from smoltrain.doctor.links import ROUNDS, HostLink, choose_pairs, find_slow_ranks, measure_clocks, measure_links
from tests.ranks import Ranks, world

FAST, SLOW = HostLink(1e-4, 1e9), HostLink(0.05, 1e6)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 9, 64])
def test_nobody_is_in_two_pairs_of_a_round_and_few_machines_all_meet(count: int) -> None:
    ranks = list(range(0, 8 * count, 8))
    rounds = choose_pairs(ranks)
    assert len(rounds) <= ROUNDS
    for pairs in rounds:
        busy = [rank for pair in pairs for rank in pair]
        assert len(busy) == len(set(busy)) >= count - 1
    met = [pair for pairs in rounds for pair in pairs]
    assert len(met) == len(set(met))
    if count <= ROUNDS + 1:
        assert set(met) == set(itertools.combinations(ranks, 2))
    assert {rank for pair in met for rank in pair} == set(ranks)


def test_the_slow_one_is_named_and_not_those_that_talk_with_it() -> None:
    links = {(0, 1): FAST, (0, 2): SLOW, (1, 2): SLOW}
    assert find_slow_ranks(links, lambda link: link.latency_s, 4.0) == [2]
    assert find_slow_ranks(links, lambda link: 1 / link.bytes_s, 2.0) == [2]
    assert find_slow_ranks({(0, 1): FAST, (0, 2): FAST, (1, 2): FAST}, lambda link: link.latency_s, 4.0) == []
    assert find_slow_ranks({(0, 1): SLOW}, lambda link: link.latency_s, 4.0) == [], "of two neither can be named"


def measure_here() -> tuple[dict[Any, HostLink], dict[int, tuple[float, float]]]:
    return measure_links(world(), [0, 1]), measure_clocks(world(), [0, 1])


def test_links_are_measured_both_ways_and_known_to_all(ranks: Callable[[int], Ranks]) -> None:
    (first, clocks), (second, nothing) = ranks(2).run(measure_here)
    assert first == second
    assert set(first) == {(0, 1)}
    assert 0 < first[0, 1].latency_s < 5
    assert first[0, 1].bytes_s > 1e4
    offset, doubt = clocks[1]
    assert abs(offset) <= doubt, "one machine has one clock"
    assert nothing in ({}, {0: (0.0, 0.0)})
