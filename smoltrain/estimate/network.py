"""The network that an estimate assumes: by the device's usual nodes, or as the command line says."""

import re
from dataclasses import dataclass, replace

from smoltrain.errors import Problem, UserError
from smoltrain.estimate.collectives import Link, Network
from smoltrain.estimate.constants import ETHERNET_HOP_S, GBIT, NCCL_CALL_S, NODES, DeviceSpec, EfficiencyRates

SPEEDS = {"gbit": GBIT, "mbit": GBIT / 1000, "gbyte": 1e9, "mbyte": 1e6}  # bytes per second
LATENCIES = {"us": 1e-6, "ms": 1e-3}
LINK_PATTERN = re.compile(r"([\d.]+)(gbit|mbit|gbyte|mbyte)(?:,([\d.]+)(us|ms))?", re.IGNORECASE)


@dataclass(frozen=True)
class NetworkWish:
    """What the command line says; None: as devices of this kind are usually joined."""

    ranks_per_node: int | None = None
    within: str | None = None
    between: str | None = None


def parse_link(text: str, option: str, usual_latency_s: float) -> Link:
    """100gbit, 400gbit,5us or 50gbyte,10us: speed in each direction and latency of a hop. Errors: UserError."""
    match = LINK_PATTERN.fullmatch(text.strip().replace("/s", ""))
    want = "speed and latency, as in 100gbit or 25gbit,50us (gbit, mbit, gbyte, mbyte a second; us, ms)"
    no_link = UserError(Problem("no such link", repr(text), want, option))
    if match is None:
        raise no_link
    try:
        bytes_per_s = float(match[1]) * SPEEDS[match[2].lower()]
        latency_s = usual_latency_s if match[3] is None else float(match[3]) * LATENCIES[match[4].lower()]
    except ValueError:  # several points
        raise no_link from None
    if bytes_per_s <= 0:
        raise no_link
    return Link(bytes_per_s, latency_s)


def build_network(device: DeviceSpec, rates: EfficiencyRates, world: int, wish: NetworkWish | None = None) -> Network:
    """What `world` ranks are joined by, at the share of its speed that is reached. Errors: UserError for a link."""
    wish = wish or NetworkWish()
    node = NODES[device.name]
    is_cpu = device.kind == "cpu"
    within = Link(device.link, node.hop_s)
    if wish.within is not None:
        within = parse_link(wish.within, "--within", node.hop_s)
    between = Link(node.between, node.between_hop_s)
    if wish.between is not None:
        between = parse_link(wish.between, "--between", node.between_hop_s)
    return Network(
        ranks_per_node=wish.ranks_per_node or (world if is_cpu else node.ranks),
        within=replace(within, bytes_per_s=within.bytes_per_s * rates.link),
        between=replace(between, bytes_per_s=between.bytes_per_s * rates.network),
        call_s=0.0 if is_cpu else NCCL_CALL_S,
        backend="gloo" if is_cpu else "nccl",
    )


def host_network(network: Network) -> Network:
    """The same for numbers of the hosts, which gloo sums up in a ring over TCP."""
    between = replace(network.between, latency_s=max(network.between.latency_s, ETHERNET_HOP_S))
    return replace(network, between=between, call_s=0.0, backend="gloo")


def describe_network(device: DeviceSpec, network: Network, world: int, wish: NetworkWish) -> str:
    """What is assumed for so many ranks at most, each value with where it comes from, in a line."""
    node = NODES[device.name]
    ranks_source = "" if wish.ranks_per_node else " (assumed)"
    within_source = "--within" if wish.within else node.within_source
    between_source = "--between" if wish.between else node.between_source
    text = (
        f"network: {network.ranks_per_node} ranks a node{ranks_source}; "
        f"within it {_describe_link(network.within)} a rank ({within_source})"
    )
    if network.num_nodes(world) > 1:
        text += f"; between nodes {_describe_link(network.between)} a node ({between_source})"
    return f"{text}; speeds are those that are reached"


def _describe_link(link: Link) -> str:
    return f"{link.bytes_per_s / 1e9:.3g} GB/s and {link.latency_s * 1e6:.3g} us"
