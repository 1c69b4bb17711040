"""The verb `smoltrain estimate`: an estimate in print, corrected by real steps where they are asked for."""

from dataclasses import replace

import torch
from rich.console import Console

from smoltrain.config.load import load_config
from smoltrain.distributed.cpu_cores import num_cores
from smoltrain.errors import Problem, UserError
from smoltrain.estimate.constants import EFFICIENCY, GIB
from smoltrain.estimate.devices import find_device
from smoltrain.estimate.fitting import build_fitted_setup, fit_config_to_memory
from smoltrain.estimate.horizon import resolve_config
from smoltrain.estimate.measure import measure_run
from smoltrain.estimate.memory import estimate_memory
from smoltrain.estimate.report import (
    Estimate,
    build_alternatives_table,
    build_parts_table,
    estimate_alternatives,
    plan_summary,
    setup_summary,
    write_advice,
)
from smoltrain.terminal import open_console, print_text


def print_estimate(recipe: str, overrides: list[str], world: int, device: str, *, measured: bool = False) -> None:
    """Print memory, time, alternatives and advice for `world` ranks, each on such a device.

    With `measured` some real steps are trained here, on as many ranks as there are to be, or as this machine has; both
    the estimate and what they showed are printed, and the constants are corrected by the difference.
    Errors: UserError for the recipe, the device, a batch that does not divide; TrainingStopped from the real steps.
    """
    console = open_console()
    config = load_config(recipe, overrides)
    config = resolve_config(config, config.batch.rows(world))
    spec = find_device(device, world)
    config = fit_config_to_memory(config, spec.memory, world, device=spec.kind)
    estimate = Estimate(build_fitted_setup(config, spec.memory, world, device=spec.kind), spec)
    if measured:
        estimate = _correct_by_real_steps(estimate, recipe, overrides, console)
    alternatives = estimate_alternatives(estimate, config)
    print_text(setup_summary(estimate, config), console)
    console.print(build_parts_table(estimate))
    console.print(build_alternatives_table(alternatives, estimate.setup))
    for line in (plan_summary(estimate, config), *write_advice(estimate, alternatives)):
        print_text(line, console)


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
        config = resolve_config(config, config.batch.rows(ranks))
        config = fit_config_to_memory(config, device.memory, ranks, device=device.kind)
        expected = Estimate(build_fitted_setup(config, device.memory, ranks, device=device.kind), device)
    setup = replace(expected.setup, saves_midway=False)
    expected = replace(expected, setup=setup)
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
