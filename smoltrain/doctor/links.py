"""The network between machines, pair by pair: how long a byte takes, how many get through, and whose clock is wrong."""

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch

from smoltrain.distributed.world import World

ROUNDS = 5  # of pairs: beyond so many machines not everybody meets everybody
PINGS = 10
FIRST_BYTES, MOST_BYTES = 2**16, 2**26
LONG_S = 0.3  # one transfer that takes so long says enough


class HostLink(NamedTuple):
    """Between the machines of two ranks, both ways in turn."""

    latency_s: float  # of one way
    bytes_s: float


def choose_pairs(ranks: list[int]) -> list[list[tuple[int, int]]]:
    """Rounds of pairs, in each of which nobody is in two: the circle method of tournaments.

    The first one stays in its place, the others move on by one place a round.
    """
    places: list[int | None] = [*ranks, *([None] if len(ranks) % 2 else [])]
    rounds: list[list[tuple[int, int]]] = []
    for _ in range(min(len(places) - 1, ROUNDS)):
        half = len(places) // 2
        pairs: list[tuple[int, int]] = []
        for one, other in zip(places[:half], reversed(places[half:]), strict=True):
            if one is not None and other is not None:
                pairs.append((min(one, other), max(one, other)))
        rounds.append(pairs)
        places = [places[0], places[-1], *places[1:-1]]
    return rounds


def measure_links(world: World, ranks: list[int]) -> dict[tuple[int, int], HostLink]:
    """The links between these ranks, on every rank. Collective; pairs of a round are measured at the same time."""
    own: dict[tuple[int, int], HostLink] = {}
    for pairs in choose_pairs(ranks):
        for pair in pairs:
            if world.rank == pair[0]:
                own[pair] = measure_link(world, pair[1])
            elif world.rank == pair[1]:
                answer_link(world, pair[0])
        world.barrier()
    links: dict[tuple[int, int], HostLink] = {}
    for of_rank in world.gather(own):
        links |= of_rank
    return links


def measure_link(world: World, other: int) -> HostLink:
    """To a rank that answers (`answer_link`): whatever is sent comes back, so that both ways count."""
    echo_s(world, other, 8)  # the first one connects
    latency_s = min(echo_s(world, other, 8) for _ in range(PINGS)) / 2
    size = FIRST_BYTES
    took_s = echo_s(world, other, size)
    while took_s < LONG_S and size < MOST_BYTES:
        size *= 4
        took_s = echo_s(world, other, size)
    world.send(torch.zeros(1, dtype=torch.int64), other)
    return HostLink(latency_s, 2 * size / took_s)


def echo_s(world: World, other: int, size: int) -> float:
    """Seconds for so many bytes to go there and come back."""
    sent = torch.zeros(size, dtype=torch.uint8)
    world.send(torch.tensor([size]), other)
    began = time.perf_counter()
    world.send(sent, other)
    world.receive(sent, other)
    return time.perf_counter() - began


def answer_link(world: World, other: int) -> None:
    """Send back what comes, until nothing more is to come."""
    announced = torch.ones(1, dtype=torch.int64)
    while True:
        world.receive(announced, other)
        size = int(announced)
        if size == 0:
            return
        received = torch.empty(size, dtype=torch.uint8)
        world.receive(received, other)
        world.send(received, other)


def find_slow_ranks(
    links: dict[tuple[int, int], HostLink], value: Callable[[HostLink], float], factor: float
) -> list[int]:
    """Those whose best link is worse than the median of all best links by this factor; a larger `value` is worse.

    The best counts, as a good machine too has a bad link to a bad one. Of two machines neither can be named.
    """
    best: dict[int, float] = {}
    for pair, link in links.items():
        for rank in pair:
            best[rank] = min(best.get(rank, float("inf")), value(link))
    if len(best) < 3:
        return []
    usual = median(best.values())
    return sorted(rank for rank, worst in best.items() if worst > factor * usual)


def read_clock() -> float:
    """The time of this machine, in seconds since 1970."""
    return time.time()


def measure_clocks(world: World, ranks: list[int]) -> dict[int, tuple[float, float]]:
    """By how many seconds the clock of each of these ranks is ahead of rank 0's, and by how much that may be wrong.

    As NTP does it: the other's time, held against the middle of asking and hearing; of some tries the shortest.
    Collective; the result is rank 0's alone.
    """
    offsets: dict[int, tuple[float, float]] = {}
    told = torch.zeros(1, dtype=torch.float64)
    for rank in ranks:
        if rank == 0:
            offsets[0] = (0.0, 0.0)
            continue
        for _ in range(PINGS):
            if world.rank == rank:
                world.receive(told, 0)
                world.send(torch.tensor([read_clock()], dtype=torch.float64), 0)
            elif world.rank == 0:
                asked_at = read_clock()
                world.send(told, rank)
                world.receive(told, rank)
                heard_at = read_clock()
                doubt = (heard_at - asked_at) / 2
                if rank not in offsets or doubt < offsets[rank][1]:
                    offsets[rank] = (float(told) - (asked_at + heard_at) / 2, doubt)
    return offsets
