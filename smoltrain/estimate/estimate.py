"""TODO: moved out of __init__.py."""

from dataclasses import replace

from rich.console import Console

from smoltrain.config.load import load_config
from smoltrain.distributed.cpu_cores import num_cores
from smoltrain.errors import Problem, UserError
from smoltrain.estimate.case import build_training_setup
from smoltrain.estimate.devices import DeviceSpec, find_device
from smoltrain.estimate.fitting import fit_config_to_memory
from smoltrain.estimate.measure import measure_run
from smoltrain.estimate.memory import GIB, estimate_memory
from smoltrain.estimate.report import (
    build_alternatives_table,
    build_estimate,
    build_parts_table,
    estimate_alternatives,
    plan_summary,
    write_advice,
)
from smoltrain.estimate.speed import EfficiencyRates, correct_efficiency, default_efficiency


def print_estimate(recipe: str, overrides: list[str], world: int, device: str, *, measured: bool = False) -> None:
    """Print memory, time, alternatives and advice for `world` ranks, each on such a device.

    With `measured` some real steps are trained here, on as many ranks as there are to be, or as this machine has; both
    the estimate and what they showed are printed, and the constants are corrected by the difference.
    Errors: UserError for the recipe, the device, a batch that does not divide; TrainingStopped from the real steps.
    """
    console = Console(markup=False, highlight=False)
    settings, here = load_config(recipe, overrides), find_device(device, world)
    settings = fit_config_to_memory(settings, here.memory, world, device=here.kind)
    asked = build_training_setup(settings, world=world, device=here.kind)
    rates, base = (_measure_corrections(recipe, overrides, world, here, console)) if measured else (None, None)
    one = build_estimate(asked, here, rates, base)
    console.print(
        f"{settings.run.name}: {asked.shape.parameters:,} parameters on {world} x {here.name}, ZeRO-{asked.stage}, "
        f"{asked.precision}, {asked.micro_batch} rows x {asked.accumulation} a rank and step, T {asked.length}, "
        f"attention {asked.attention}, loss {asked.loss}",
        soft_wrap=True,
    )
    console.print(build_parts_table(one))
    rows = estimate_alternatives(one, settings, rates, base)
    console.print(build_alternatives_table(rows, asked))
    for line in (plan_summary(one, settings), *write_advice(one, rows)):
        console.print(line, soft_wrap=True)


def _measure_corrections(
    recipe: str, overrides: list[str], world: int, device: DeviceSpec, console: Console
) -> tuple[EfficiencyRates, float]:
    """The constants, and the memory of the rest, as a real run on this machine says."""
    import torch

    gpus = torch.cuda.device_count()
    if device.kind == "cuda" and not gpus:
        raise UserError(Problem("--measure runs on this machine", "no CUDA device", "--device cpu", "--device"))
    ranks = min(world, gpus if device.kind == "cuda" else num_cores())
    here = find_device(device.name, ranks)
    asked = build_training_setup(
        fit_config_to_memory(load_config(recipe, overrides), here.memory, ranks, device=here.kind),
        world=ranks,
        device=here.kind,
    )
    expected = build_estimate(replace(asked, saves=False), here)
    compiles = "on" if asked.compiled_update else "off"  # `auto` would find a plan of few steps too short for it
    found = measure_run(recipe, [*overrides, f"engine.device={device.kind}", f"engine.compile={compiles}"], ranks)
    console.print(
        f"measured here, {ranks} x {here.name}: step {found.step_s:.3f} s, estimated {expected.speed.step_s:.3f} s; "
        f"memory {found.peak_bytes / GIB:.2f} GiB, estimated {expected.memory.total / GIB:.2f} GiB",
        soft_wrap=True,
    )
    base = found.peak_bytes - estimate_memory(expected.case, 0.0).total
    return correct_efficiency(default_efficiency(here.kind), expected.speed.step_s, found.step_s), max(0.0, base)
