"""What the ranks of several machines find together: each of these is collective, and rank 0's finding counts."""

import contextlib
import platform
import time
from collections import Counter
from collections.abc import Callable
from statistics import median

import torch
from torch.cuda import nccl

from smoltrain.config.schema import Config
from smoltrain.distributed.world import World
from smoltrain.doctor.check import Finding
from smoltrain.doctor.exchange import bus_bandwidth, exchange_known_numbers, measure_latency_s, wait_for_device
from smoltrain.doctor.links import HostLink, find_slow_ranks, measure_clocks, measure_links
from smoltrain.doctor.software import find_version
from smoltrain.run.shared_folder import find_unseen_folders
from smoltrain.version import VERSION

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "datasets", "numpy", "wandb")
NUMEL_PER_RANK = 2**20  # fp32 numbers that are added up
SHORT_S = 0.5  # of a sixteenth of them: then all are tried
SLOW_FACTOR = 2.0  # slower than the others by this much is odd
LATENCY_FACTOR, LATENCY_S = 4.0, 1e-3  # and at least so long
GBIT_BYTES_S = 125e6
SKEW_S, WRONG_S = 1.0, 900.0  # of clocks; S3 refuses a request that is a quarter of an hour off
PRODUCT_SIZE, PRODUCTS = 512, 5


def first_ranks(world: World) -> list[int]:
    """The first rank of each machine, in order."""
    return [world.machines.index(machine) for machine in sorted(set(world.machines))]


def name_hosts(world: World, ranks: list[int]) -> str:
    """The names of the machines of these ranks, each once."""
    return ", ".join(dict.fromkeys(world.hosts[rank] for rank in ranks))


def describe_odd(values: dict[str, str]) -> str | None:
    """Which machines (name -> value) differ from most; None if all agree."""
    counts = Counter(values.values())
    if len(counts) == 1:
        return None
    usual, number = counts.most_common(1)[0]
    odd = [f"{host} has {value}" for host, value in values.items() if value != usual]
    others = [host for host, value in values.items() if value == usual]
    rest = f"the other {number} have" if number > 1 else f"{others[0]} has"
    return f"{', '.join(odd)}; {rest} {usual}"


def describe_hosts(world: World) -> Finding:
    """Which machines there are, and whether all have as many ranks."""
    counts = Counter(world.machines)
    texts: list[str] = []
    for rank in first_ranks(world):
        number = counts[world.machines[rank]]
        texts.append(f"{world.hosts[rank]} ({number} rank{'s' * (number > 1)})")
    saw = f"{world.size} ranks on {world.num_machines} machines: {', '.join(texts)}"
    if world.num_machines == 1:
        advice = "torchrun or srun on every machine: docs/clusters.md"
        return Finding("warning", f"all {world.size} ranks are on one machine, {world.hosts[0]}", advice)
    if len(set(counts.values())) > 1:
        return Finding("warning", saw, "as many ranks on every machine: those that have fewer wait for the others")
    return Finding("ok", saw)


def collect_versions() -> dict[str, str]:
    """What must be the same on all machines, as ranks on them compute together."""
    versions = {package: find_version(package) or "none" for package in PACKAGES}
    versions |= {"python": platform.python_version(), "smoltrain": VERSION}
    versions["torch"] = f"{versions['torch']} for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'CPUs'}"
    if torch.cuda.is_available():
        versions["NCCL"] = ".".join(map(str, nccl.version()))
        versions["GPU"] = torch.cuda.get_device_name()
    return versions


def check_versions(world: World) -> Finding:
    """Python, smoltrain, torch and the other packages, and the GPU."""
    everyones = world.gather(collect_versions())
    of_hosts = {world.hosts[rank]: everyones[rank] for rank in first_ranks(world)}
    differences: list[str] = []
    for what in sorted({name for versions in of_hosts.values() for name in versions}):
        odd = describe_odd({host: versions.get(what, "none") for host, versions in of_hosts.items()})
        if odd:
            differences.append(f"{what}: {odd}")
    if differences:
        advice = "one environment for all: the same .venv on a shared disk, the same image, or constraints.txt"
        return Finding("fault", "; ".join(differences), advice)
    own = of_hosts[world.hosts[0]]
    return Finding(
        "ok", f"the same everywhere: python {own['python']}, smoltrain {own['smoltrain']}, torch {own['torch']}"
    )


def check_folder(config: Config, world: World) -> Finding:
    """Whether all machines see one run.folder, which is made if it is not there. Errors: UserError."""
    folder = config.run.folder
    if config.checkpoint.shared == "off":
        return Finding("ok", "not looked at: checkpoint.shared=off gives each machine a folder of its own")
    is_new = world.run_on_first_rank(lambda: not folder.is_dir())
    world.run_on_first_rank(lambda: folder.mkdir(parents=True, exist_ok=True))
    try:
        unseen = find_unseen_folders([folder], world)
    finally:
        if is_new and world.is_first:
            with contextlib.suppress(OSError):
                folder.rmdir()
    if unseen:
        saw = "; ".join(f"{host} does not see {path} of {world.hosts[0]}" for host, path in unseen.items())
        return Finding("fault", saw, "a run.folder that all mount at one path, or checkpoint.shared=off")
    return Finding("ok", f"all see {folder.absolute()}, and what {world.hosts[0]} writes there")


def check_clocks(world: World) -> Finding:
    """How far the clocks are apart: logs, certificates and signed requests go by them."""
    offsets = measure_clocks(world, first_ranks(world))
    return judge_clocks({world.hosts[rank]: offsets[rank] for rank in offsets})


def judge_clocks(offsets: dict[str, tuple[float, float]]) -> Finding:
    """Of machines, in the order of their ranks: seconds ahead of the first one, and by how much that may be wrong."""
    first, *others = offsets or {"": (0.0, 0.0)}
    usual = median(offset for offset, _ in offsets.values()) if len(others) > 1 else 0.0
    reference = "most others" if len(others) > 1 else first
    texts: list[str] = []
    most = 0.0
    for host, (offset, doubt) in offsets.items():
        apart = offset - usual
        if abs(apart) - doubt > SKEW_S:
            most = max(most, abs(apart))
            texts.append(f"{host} is {abs(apart):,.1f} s {'ahead of' if apart > 0 else 'behind'} {reference}")
    if texts:
        status = "fault" if most > WRONG_S else "warning"
        return Finding(status, "; ".join(texts), "`timedatectl set-ntp true` (chrony, systemd-timesyncd) there")
    apart = max((abs(offset) + doubt for offset, doubt in offsets.values()), default=0.0)
    return Finding("ok", f"at most {apart * 1e3:,.1f} ms apart")


def check_compute(world: World) -> Finding:
    """Whether every rank multiplies right, and none is much slower than the others: heat, power, a neighbour."""
    took_s, is_right = multiply_known_matrices(world)
    everyones = world.gather((took_s, is_right))
    wrong = [rank for rank, (_, right) in enumerate(everyones) if not right]
    if wrong:
        saw = f"rank {', '.join(map(str, wrong))} on {name_hosts(world, wrong)} multiplies wrong"
        return Finding("fault", saw, "take that machine out: its memory, processor or GPU is broken")
    usual = median(seconds for seconds, _ in everyones)
    slow = [rank for rank, (seconds, _) in enumerate(everyones) if seconds > SLOW_FACTOR * usual]
    if slow:
        factor = max(everyones[rank][0] for rank in slow) / usual
        saw = f"{name_hosts(world, slow)} computes {factor:.1f} times slower than the others"
        return Finding("warning", saw, "`smoltrain doctor` there: clocks, threads, neighbours; all ranks wait for it")
    slowest = max(seconds for seconds, _ in everyones) / usual
    return Finding("ok", f"all multiply right, the slowest at {1 / slowest:.0%} of the usual speed")


def multiply_known_matrices(world: World) -> tuple[float, bool]:
    """(seconds of the fastest product of two matrices on this rank's device, whether all were exact)."""
    places = torch.arange(PRODUCT_SIZE, device=world.device, dtype=torch.float32)
    a = (places[:, None] + places) % 4
    expected = (a.double() @ a.double()).float()
    fastest_s = float("inf")
    is_right = True
    for _ in range(PRODUCTS):
        wait_for_device(world)
        began = time.perf_counter()
        product = a @ a
        wait_for_device(world)
        fastest_s = min(fastest_s, time.perf_counter() - began)
        is_right = is_right and bool(torch.equal(product, expected))
    return fastest_s, is_right


def check_links(world: World) -> Finding:
    """Latency and bandwidth of the host network between pairs of machines, and who is slower than the others."""
    if world.num_machines == 1:
        return Finding("ok", "one machine: nothing to measure")
    links = measure_links(world, first_ranks(world))
    return judge_links(links, lambda ranks: name_hosts(world, ranks))


def judge_links(links: dict[tuple[int, int], HostLink], name: Callable[[list[int]], str]) -> Finding:
    """By what was measured; `name` gives the machines of ranks."""
    slow = find_slow_ranks(links, lambda link: 1 / link.bytes_s, SLOW_FACTOR)
    late = find_slow_ranks(links, lambda link: max(link.latency_s, LATENCY_S), LATENCY_FACTOR)
    worst = min(links, key=lambda pair: links[pair].bytes_s)
    latest = max(links, key=lambda pair: links[pair].latency_s)
    gbit_s = links[worst].bytes_s * 8e-9
    saw = (
        f"{gbit_s:.2f} Gbit/s at least ({name([worst[0]])} and {name([worst[1]])}), "
        f"{links[latest].latency_s * 1e3:.2f} ms at most ({name([latest[0]])} and {name([latest[1]])})"
    )
    advice = "its cable, switch port, MTU, or the interface it takes (GLOO_SOCKET_IFNAME); `iperf3` between the two"
    if slow or late:
        odd = name(sorted({*slow, *late}))
        best = max(link.bytes_s for link in links.values()) * 8e-9
        return Finding("warning", f"{odd} is slower than the others: {saw}, {best:.2f} Gbit/s at best", advice)
    if links[worst].bytes_s < GBIT_BYTES_S:
        estimate = f"`smoltrain estimate RECIPE --world 2..64 --between {gbit_s:.2g}gbit` says what a step waits"
        return Finding("warning", f"slow for ordinary Ethernet: {saw}", f"{advice}; {estimate}")
    return Finding("ok", saw)


def check_sums(world: World) -> Finding:
    """An all-reduce of known numbers over all ranks, by the collectives of a run."""
    numel = NUMEL_PER_RANK // 16 * world.size
    took_s, is_right = exchange_known_numbers(world, numel)  # which connects, and is short on a slow link
    [slowest_s] = world.max_floats(took_s)
    if slowest_s < SHORT_S:
        numel = NUMEL_PER_RANK * world.size
        took_s, is_right_again = exchange_known_numbers(world, numel)
        is_right = is_right and is_right_again
    latency_s = measure_latency_s(world)
    everyones = world.gather(is_right)
    wrong = [rank for rank, right in enumerate(everyones) if not right]
    if wrong:
        saw = f"rank {', '.join(map(str, wrong))} on {name_hosts(world, wrong)} gets wrong sums"
        return Finding("fault", saw, "that machine's network card, memory or NCCL: take it out and try again")
    speed = bus_bandwidth(world, numel, took_s)
    what = f"{4 * numel / 2**20:,.1f} MiB at {speed * 8e-9:.2f} Gbit/s a rank, one number in {latency_s * 1e3:.2f} ms"
    return Finding("ok", f"right sums over {world.size} ranks: {what}")
