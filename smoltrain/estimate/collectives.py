"""Seconds of one collective over nodes of several ranks: alpha-beta models, pure functions.

A message of x bytes over a link takes alpha + x / B (Thakur, Rabenseifner, Gropp 2005). A ring of W ranks reduce-
scatters or all-gathers x bytes in W - 1 hops, of which each rank sends x (W - 1) / W in all (Patarasuk & Yuan 2009); it
crosses from node to node in M - 1 of them, M nodes, and is as fast as its slowest link. That, and the hops of the tree,
is how NCCL predicts its own times (src/graph/tuning.cc: ncclTopoTuneModel).
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """What a message costs: the time of its way, and of its bytes."""

    bytes_per_s: float  # each direction
    latency_s: float  # of one hop


@dataclass(frozen=True)
class Network:
    """How ranks are joined. Links are as fast as they are in use, not by their data sheets."""

    ranks_per_node: int
    within: Link  # of each rank, to the others of its node
    between: Link  # of a node to the other nodes, which all its ranks share
    call_s: float = 0.0  # that a collective takes at least
    has_trees: bool = True  # all-reduce by trees between the nodes where that is faster, as NCCL; gloo has rings alone

    def num_nodes(self, world: int) -> int:
        """Nodes that so many ranks fill; the last one perhaps in part."""
        return -(-world // self.ranks_per_node)


def ring_seconds(num_bytes: float, world: int, network: Network, rounds: int = 1) -> float:
    """To reduce-scatter or all-gather so many bytes around a ring; an all-reduce is both, in two `rounds`."""
    if world == 1:
        return 0.0
    nodes = network.num_nodes(world)
    hops_between = rounds * (nodes - 1)
    hops_within = rounds * (world - 1) - hops_between
    latency_s = hops_within * network.within.latency_s + hops_between * network.between.latency_s
    slowest = network.within.bytes_per_s
    if nodes > 1:
        slowest = min(slowest, network.between.bytes_per_s)
    return network.call_s + latency_s + rounds * num_bytes * (world - 1) / world / slowest


def hierarchical_all_reduce_seconds(num_bytes: float, world: int, network: Network) -> float:
    """To reduce-scatter within each node, all-reduce between the nodes in a tree, and all-gather within each."""
    if world == 1:
        return 0.0
    nodes = network.num_nodes(world)
    ranks = min(world, network.ranks_per_node)
    within_s = (ranks - 1) * network.within.latency_s + num_bytes * (ranks - 1) / ranks / network.within.bytes_per_s
    hops_between = math.ceil(math.log2(nodes))
    between_s = hops_between * network.between.latency_s
    between_s += num_bytes * (nodes - 1) / nodes / network.between.bytes_per_s
    return network.call_s + 2 * within_s + 2 * between_s


def all_reduce_seconds(num_bytes: float, world: int, network: Network) -> float:
    """By the faster of both ways, where there are both."""
    ring_s = ring_seconds(num_bytes, world, network, rounds=2)
    if not network.has_trees:
        return ring_s
    return min(ring_s, hierarchical_all_reduce_seconds(num_bytes, world, network))


def exchange_seconds(sent_bytes: float, world: int, network: Network) -> float:
    """For every rank to send so many bytes to others, wherever they are: at the worst, all of it leaves the node."""
    if world == 1:
        return 0.0
    within_s = sent_bytes / network.within.bytes_per_s
    if network.num_nodes(world) == 1:
        return within_s
    return max(within_s, sent_bytes * network.ranks_per_node / network.between.bytes_per_s)
