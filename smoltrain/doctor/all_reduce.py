"""Two ranks of this machine that meet, add up numbers, and leave: what every run needs, with a time limit.

python -m smoltrain.doctor.all_reduce cpu|cuda       one of them, with the environment of a launcher
"""

import json
import re
import sys

from smoltrain.distributed.rendezvous import RankPlace, open_rendezvous_socket
from smoltrain.doctor.check import Finding
from smoltrain.doctor.child import ChildResult, await_child, child_environment, kill_child, start_child
from smoltrain.errors import FAULT

MODULE = "smoltrain.doctor.all_reduce"
RANKS = 2
LIMIT_S = 30.0  # of which importing torch takes the most
GRACE_S = 1.0  # for the other rank, when one has failed
NUMEL = 2**20
GLOO_SOURCE = re.compile(r"\[enforce fail at [^]]*\] .*?\. ")  # a line of C++ and its condition, in gloo's errors


def check_all_reduce(device: str, limit_s: float = LIMIT_S) -> Finding:
    """Over gloo on the loopback (cpu), or NCCL between two GPUs (cuda)."""
    results = run_two_ranks(device, limit_s)
    what = {"cpu": "gloo on the loopback", "cuda": "NCCL between two GPUs"}[device]
    failures = {rank: result for rank, result in enumerate(results) if result.code != 0}
    if failures:
        # A rank that waits for another is not at fault: who has said something comes first.
        rank = min(failures, key=lambda rank: (failures[rank].code is None, rank))
        variables = {"cpu": "GLOO_SOCKET_IFNAME", "cuda": "NCCL_* (NCCL_DEBUG=INFO says what NCCL takes)"}[device]
        advice = f"the loopback (`ip addr show lo`), a firewall on it, and {variables}: a run would hang or end there"
        why = GLOO_SOURCE.sub("", failures[rank].describe_failure(limit_s))
        saw = f"rank {rank} of {RANKS} over {what}: {why}"
        return Finding("fault", saw, advice)
    told = json.loads(results[0].out.strip().splitlines()[-1])
    if not told["right"]:
        return Finding("fault", f"the sums of {RANKS} ranks over {what} are wrong", "another torch, another machine")
    saw = (
        f"{RANKS} ranks over {what}: right sums, {told['latency_s'] * 1e6:,.0f} us, {told['bytes_s'] / 2**30:.2f} GiB/s"
    )
    return Finding("ok", saw)


def run_two_ranks(device: str, limit_s: float) -> list[ChildResult]:
    """How each of them ended; none is left."""
    listener = open_rendezvous_socket(RankPlace(size=RANKS, local_size=RANKS))
    with listener:
        port = listener.getsockname()[1]
        processes = []
        for rank in range(RANKS):
            environment = child_environment(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            )  # fmt: skip
            handles: list[int] = []
            if rank == 0:
                handles = [listener.fileno()]
                environment["SMOLTRAIN_LISTENER"] = str(listener.fileno())
            processes.append(start_child(["-m", MODULE, device], environment, handles))
    results: list[ChildResult] = []
    try:
        for process in processes:
            results.append(await_child(process, limit_s))
            if results[-1].code != 0:
                limit_s = min(limit_s, GRACE_S)  # the other one waits for this one
    finally:
        for process in processes:
            kill_child(process)
    return results


def reduce_as_rank(device: str) -> int:
    """One of the two; rank 0 prints what was measured."""
    from smoltrain.distributed.world import close_world, open_world
    from smoltrain.doctor.exchange import bus_bandwidth, exchange_known_numbers, measure_latency_s

    world = open_world("cuda" if device == "cuda" else "cpu")
    _, is_right = exchange_known_numbers(world, NUMEL)  # the first one connects
    took_s, is_right_again = exchange_known_numbers(world, NUMEL)
    latency_s = measure_latency_s(world)
    [wrong] = world.sum_ints(not (is_right and is_right_again))
    if world.is_first:
        told = {"right": not wrong, "latency_s": latency_s, "bytes_s": bus_bandwidth(world, NUMEL, took_s)}
        print(json.dumps(told), flush=True)
    close_world()
    return FAULT if wrong else 0


if __name__ == "__main__":
    sys.exit(reduce_as_rank(sys.argv[1]))
