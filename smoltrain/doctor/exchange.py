"""Numbers whose right sums are known, through the collectives that a run uses."""

import time

import torch

from smoltrain.distributed.world import World

ROUNDS = 20  # of which the fastest counts
PERIOD = 251  # numbers are small and whole, so that every sum in fp32 is exact


def exchange_known_numbers(world: World, numel: int) -> tuple[float, bool]:
    """(seconds of a reduce-scatter and an all-gather of fp32 numbers, whether all sums are right). Collective.

    `numel` is a multiple of the ranks.
    """
    base = torch.arange(numel, device=world.device, dtype=torch.float32) % PERIOD
    whole = base + world.rank
    part = whole.new_empty(numel // world.size)
    wait_for_device(world)
    world.barrier()
    began = time.perf_counter()
    world.reduce_scatter(part, whole)
    world.all_gather(whole, part)
    wait_for_device(world)
    took_s = time.perf_counter() - began
    expected = base * world.size + world.size * (world.size - 1) / 2
    return took_s, bool(torch.equal(whole, expected))


def wait_for_device(world: World) -> None:
    """A GPU computes on while the host measures."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def measure_latency_s(world: World) -> float:
    """Of a sum of one number over all ranks: the fastest of some. Collective."""
    fastest_s = float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        world.sum_ints(1)
        fastest_s = min(fastest_s, time.perf_counter() - began)
    return fastest_s


def bus_bandwidth(world: World, numel: int, took_s: float) -> float:
    """Bytes a second that each rank has sent: nccl-tests' busbw of an all-reduce, 2(n-1)/n of the fp32 numbers."""
    return 2 * (world.size - 1) / world.size * 4 * numel / took_s
