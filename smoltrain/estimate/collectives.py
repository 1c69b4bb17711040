"""Seconds of one collective over nodes of several ranks: alpha-beta models, pure functions.

A message of x bytes over a link takes alpha + x / B (Thakur, Rabenseifner, Gropp 2005). A ring of W ranks reduce-
scatters or all-gathers x bytes in W - 1 hops, of which each rank sends x (W - 1) / W in all (Patarasuk & Yuan 2009); it
crosses from node to node in M - 1 of them, M nodes, and is as fast as its slowest link. That, and the hops of the tree,
is how NCCL predicts its own times (src/graph/tuning.cc: ncclTopoTuneModel).

gloo's hops over TCP take two latencies: the receiver says that it is ready, then the bytes come (NOTIFY_RECV_READY in
gloo/transport/tcp/pair.cc). Its all-reduce (gloo/allreduce.cc) cuts a rank's part into segments of at most 1 MiB, two
at least, and has two of them under way: each further one waits for a latency more.
"""

import math
from dataclasses import dataclass
from typing import Literal

from smoltrain.estimate.constants import GLOO_HOP_LATENCIES, GLOO_SEGMENT_BYTES


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
    backend: Literal["nccl", "gloo"] = "nccl"

    @property
    def hop_latencies(self) -> int:
        """How many latencies a hop takes."""
        return GLOO_HOP_LATENCIES if self.backend == "gloo" else 1

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
    latency_s *= network.hop_latencies
    farthest = network.between if nodes > 1 else network.within
    if network.backend == "gloo" and rounds == 2:
        latency_s += rounds * _count_waiting_segments(num_bytes, world) * farthest.latency_s
    slowest = min(network.within.bytes_per_s, farthest.bytes_per_s)
    return network.call_s + latency_s + rounds * num_bytes * (world - 1) / world / slowest


def _count_waiting_segments(num_bytes: float, world: int) -> int:
    """Of gloo's all-reduce: those beyond the two of each rank's part that are under way at once."""
    segments = math.ceil(num_bytes / GLOO_SEGMENT_BYTES)
    per_rank = max(2, math.ceil(segments / world))
    return (per_rank - 2) * world


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
    """By the faster of both ways under NCCL; gloo has rings alone."""
    ring_s = ring_seconds(num_bytes, world, network, rounds=2)
    if network.backend == "gloo":
        return ring_s
    return min(ring_s, hierarchical_all_reduce_seconds(num_bytes, world, network))


def exchange_seconds(sent_bytes: float, world: int, network: Network, calls: int) -> float:
    """For every rank to send so many bytes to others, in so many all-to-alls: at the worst, all to other nodes."""
    if world == 1 or not sent_bytes:
        return 0.0
    seconds = sent_bytes / network.within.bytes_per_s
    farthest = network.within
    if network.num_nodes(world) > 1:
        seconds = max(seconds, sent_bytes * network.ranks_per_node / network.between.bytes_per_s)
        farthest = network.between
    return seconds + calls * (network.call_s + network.hop_latencies * farthest.latency_s)
