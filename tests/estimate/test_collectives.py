"""Seconds of collectives: numbers by hand, and what they must be at the limits."""

import dataclasses
import math
from collections.abc import Callable

import pytest

from smoltrain.estimate.collectives import (
    Link,
    Network,
    all_reduce_seconds,
    exchange_seconds,
    hierarchical_all_reduce_seconds,
    ring_seconds,
)

# Four ranks a node; 10 bytes a second within and 1 s a hop, 5 and 3 between; 0.5 s a call.
SLOW = Network(4, within=Link(10.0, 1.0), between=Link(5.0, 3.0), call_s=0.5)
FASTEST = Network(4, within=Link(math.inf, 0.0), between=Link(math.inf, 0.0))
EVERY = (ring_seconds, hierarchical_all_reduce_seconds, all_reduce_seconds)


def test_a_ring_is_what_hand_computes():
    assert ring_seconds(80, 2, SLOW) == 0.5 + 1 + 80 / 2 / 10, "one hop within a node"
    # Eight ranks on two nodes: 7 hops, one of them between; 70 bytes over the slower link.
    assert ring_seconds(80, 8, SLOW) == 0.5 + 6 * 1 + 1 * 3 + 70 / 5
    assert ring_seconds(80, 8, SLOW, rounds=2) == 0.5 + 12 * 1 + 2 * 3 + 2 * 70 / 5
    assert SLOW.num_nodes(9) == 3, "the last node in part"


def test_a_tree_between_nodes_is_what_hand_computes():
    # 16 ranks on four nodes: 3 hops within, 2 between, both ways; 60 bytes each way within, 60 between.
    assert hierarchical_all_reduce_seconds(80, 16, SLOW) == 0.5 + 2 * (3 * 1 + 60 / 10) + 2 * (2 * 3 + 60 / 5)
    assert all_reduce_seconds(80, 16, SLOW) == hierarchical_all_reduce_seconds(80, 16, SLOW)
    assert all_reduce_seconds(80, 16, SLOW) < ring_seconds(80, 16, SLOW, rounds=2)


# Two and three hosts, 10 ms each way: what tests/estimate cannot measure anew was measured over such links.
@pytest.mark.parametrize(("hosts", "kind", "num_bytes", "latencies"), [
    (2, "all-gather", 128, 2), (2, "all-reduce", 128, 4), (3, "all-gather", 192, 4), (3, "all-reduce", 192, 8),
    (2, "all-reduce", 10 * 2**20, 4 + 2 * 2 * 3),  # five segments of each rank, of which two are under way
    (2, "all-gather", 10 * 2**20, 2),
])  # fmt: skip
def test_gloo_takes_two_latencies_a_hop_and_one_for_each_waiting_segment(
    hosts: int, kind: str, num_bytes: int, latencies: int
):
    network = Network(1, within=Link(math.inf, 0.0), between=Link(math.inf, 10e-3), backend="gloo")
    rounds = 2 if kind == "all-reduce" else 1
    assert ring_seconds(num_bytes, hosts, network, rounds) == pytest.approx(latencies * 10e-3)
    if kind == "all-reduce":
        assert all_reduce_seconds(num_bytes, hosts, network) == ring_seconds(num_bytes, hosts, network, rounds)


@pytest.mark.parametrize("seconds", EVERY)
def test_limits(seconds: Callable[[float, int, Network], float]):
    assert seconds(80, 1, SLOW) == 0.0, "one rank"
    assert seconds(80, 64, FASTEST) == 0.0, "neither latency nor bytes"
    assert seconds(0, 64, SLOW) == seconds(80, 64, _with_speed(SLOW, math.inf)) > 0, "latency alone"
    lone = _with_speed(SLOW, 1.0)
    added = seconds(2e9, 64, lone) - seconds(1e9, 64, lone)
    assert seconds(2e9, 64, lone) == pytest.approx(2 * added, rel=1e-6), "bytes alone"
    times = [seconds(80, world, SLOW) for world in (1, 2, 4, 8, 64, 1024)]
    assert times == sorted(times)
    assert times[-1] > 2 * times[3], "more nodes cost more"


def test_an_exchange_shares_the_link_of_the_node():
    assert exchange_seconds(100, 1, SLOW, 2) == exchange_seconds(0, 8, SLOW, 2) == 0
    assert exchange_seconds(100, 4, SLOW, 2) == 100 / 10 + 2 * (0.5 + 1)
    assert exchange_seconds(100, 8, SLOW, 2) == 4 * 100 / 5 + 2 * (0.5 + 3)
    assert exchange_seconds(100, 8, dataclasses.replace(SLOW, backend="gloo"), 2) == 4 * 100 / 5 + 2 * (0.5 + 2 * 3)


def _with_speed(network: Network, bytes_per_s: float) -> Network:
    within = dataclasses.replace(network.within, bytes_per_s=bytes_per_s)
    between = dataclasses.replace(network.between, bytes_per_s=bytes_per_s)
    return dataclasses.replace(network, within=within, between=between)
