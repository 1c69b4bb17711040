"""The verb `smoltrain estimate`: an estimate in print, corrected by real steps where they are asked for."""

from dataclasses import dataclass, field, replace

import torch
from rich.console import Console

from smoltrain.config.load import load_config
from smoltrain.config.schema import Config
from smoltrain.distributed.cpu_cores import num_cores
from smoltrain.errors import Problem, UserError
from smoltrain.estimate.collectives import Network
from smoltrain.estimate.constants import EFFICIENCY, GIB, NODE_MTBF_HOURS, DeviceSpec, EfficiencyRates
from smoltrain.estimate.devices import find_device
from smoltrain.estimate.fitting import resolve_and_fit
from smoltrain.estimate.measure import measure_run
from smoltrain.estimate.memory import estimate_memory
from smoltrain.estimate.network import NetworkWish, build_network, describe_network
from smoltrain.estimate.report import (
    Estimate,
    build_alternatives_table,
    build_parts_table,
    estimate_alternatives,
    plan_summary,
    setup_summary,
    speed_summary,
    write_advice,
)
from smoltrain.estimate.scaling import Scaling, estimate_scaling
from smoltrain.estimate.scaling_report import build_scaling_table, write_scaling_advice
from smoltrain.terminal import open_console, print_text


@dataclass(frozen=True)
class EstimateWish:
    """What the command line asks for, beside the recipe."""

    worlds: list[int]
    device: str
    network: NetworkWish = field(default_factory=NetworkWish)
    node_mtbf_hours: float = NODE_MTBF_HOURS
    measured: bool = False


def print_estimate(recipe: str, overrides: list[str], wish: EstimateWish) -> Scaling | None:
    """Print what is estimated: of one world in detail, of several in a table; what that says, to be drawn.

    Errors: UserError for the recipe, the device, a link, a batch that does not divide; TrainingStopped from real steps.
    """
    console = open_console()
    config = load_config(recipe, overrides)
    if len(wish.worlds) > 1 and wish.measured:
        saw = f"{len(wish.worlds)} of them"
        raise UserError(Problem("--measure looks at one world", saw, "one number", "--world or --measure"))
    network_wish = wish.network
    if wish.device == "cpu" and network_wish.ranks_per_node is None:  # a node is this machine with the smallest world
        network_wish = replace(network_wish, ranks_per_node=wish.worlds[0])
    ranks = min(wish.worlds[-1], network_wish.ranks_per_node or wish.worlds[-1])
    device = find_device(wish.device, ranks)
    network = build_network(device, EFFICIENCY[device.kind], wish.worlds[-1], network_wish)
    rates = None
    if len(wish.worlds) == 1:
        rates = _print_one_world(recipe, overrides, config, wish, device, network, console)
    if wish.worlds[-1] > 1:
        print_text(describe_network(device, network, wish.worlds[-1], wish.network), console)
    if network.num_nodes(wish.worlds[-1]) == 1 and len(wish.worlds) == 1:
        return None
    scaling = estimate_scaling(config, wish.worlds, device, network_wish, wish.node_mtbf_hours, rates)
    console.print(build_scaling_table(scaling))
    for line in write_scaling_advice(scaling):
        print_text(line, console)
    return scaling


def _print_one_world(
    recipe: str, overrides: list[str], config: Config, wish: EstimateWish, device: DeviceSpec, network: Network,
    console: Console,
) -> EfficiencyRates | None:  # fmt: skip
    """Print memory, time, alternatives and advice for so many ranks, each on such a device; rates that were measured.

    Where it is `measured` some real steps are trained here, on as many ranks as there are to be, or as this machine
    has; both the estimate and what they showed are printed, and the constants are corrected by the difference.
    """
    [world] = wish.worlds
    config, setup = resolve_and_fit(config, device, world)
    estimate = Estimate(setup, device, network=network)
    if wish.measured:
        estimate = _correct_by_real_steps(estimate, recipe, overrides, console)
    alternatives = estimate_alternatives(estimate, config)
    print_text(setup_summary(estimate, config), console)
    console.print(build_parts_table(estimate))
    console.print(build_alternatives_table(alternatives, estimate.setup))
    for line in (*speed_summary(estimate), plan_summary(estimate, config), *write_advice(estimate, alternatives)):
        print_text(line, console)
    return estimate.rates


def _correct_by_real_steps(estimate: Estimate, recipe: str, overrides: list[str], console: Console) -> Estimate:
    """The estimate with its rates and base as a real run on this machine says."""
    device, world = estimate.device, estimate.setup.world
    gpus = torch.cuda.device_count()
    if device.kind == "cuda" and not gpus:
        raise UserError(Problem("--measure runs on this machine", "no CUDA device", "--device cpu", "--device"))
    ranks = min(world, gpus if device.kind == "cuda" else num_cores())
    expected = estimate
    if ranks < world:  # this machine has fewer: what is measured is estimated for as many
        device = find_device(device.name, ranks)
        config = load_config(recipe, overrides)
        config, setup = resolve_and_fit(config, device, ranks)
        expected = Estimate(setup, device)
    setup = replace(expected.setup, saves_midway=False)
    expected = replace(expected, setup=setup, network=None)  # this machine is one node
    as_estimated = [
        f"engine.device={device.kind}", f"batch.micro_batch={setup.micro_batch}",
        f"engine.gradient_checkpointing={setup.recompute}",
        f"engine.compile={'on' if setup.compiled_update else 'off'}",  # `auto` would find a plan of few steps too short
    ]  # fmt: skip
    run = measure_run(recipe, [*overrides, *as_estimated], ranks)
    print_text(
        f"measured here, {ranks} x {device.name}: step {run.step_s:.3f} s, estimated {expected.speed.step_s:.3f} s; "
        f"memory {run.peak_bytes / GIB:.2f} GiB, estimated {expected.memory.total / GIB:.2f} GiB",
        console,
    )
    rates = EFFICIENCY[device.kind]
    base_bytes = max(0.0, run.peak_bytes - estimate_memory(setup, base_bytes=0.0).total)
    return replace(estimate, rates=rates.corrected(expected.speed.step_s, run.step_s), base_bytes=base_bytes)
