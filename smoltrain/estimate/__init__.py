"""What a run will need, before it is started: `smoltrain estimate RECIPE --world 8 --device h100`.

memory.py and speed.py are models of one rank: sums of named parts, with a few constants that were measured. Trust them
to find out what fits; `--measure` puts a real run of this machine beside them.
"""

from dataclasses import replace

from rich.console import Console

from smoltrain import config
from smoltrain.cores import num_cores
from smoltrain.errors import Problem, UserError
from smoltrain.estimate import report
from smoltrain.estimate.case import Case, Recompute, Shape, case, shape
from smoltrain.estimate.devices import Device, find
from smoltrain.estimate.fitting import MODES, choose_micro_batch, fits, least_recomputation, settle
from smoltrain.estimate.measure import measure
from smoltrain.estimate.memory import GIB, Memory, memory
from smoltrain.estimate.speed import CPU, CUDA, Rates, Speed, corrected, flops_per_token, rates_of, speed

__all__ = [
    "CPU", "CUDA", "GIB", "MODES", "Case", "Device", "Memory", "Rates", "Recompute", "Shape", "Speed", "case",
    "choose_micro_batch", "corrected", "estimate", "find", "fits", "flops_per_token", "least_recomputation", "measure",
    "memory", "rates_of", "report", "settle", "shape", "speed",
]  # fmt: skip


def estimate(recipe: str, overrides: list[str], world: int, device: str, *, measured: bool = False) -> None:
    """Print memory, time, alternatives and advice for `world` ranks, each on such a device.

    With `measured` some real steps are trained here, on as many ranks as there are to be, or as this machine has; both
    the estimate and what they showed are printed, and the constants are corrected by the difference.
    Errors: UserError for the recipe, the device, a batch that does not divide; TrainingStopped from the real steps.
    """
    console = Console(markup=False, highlight=False)
    settings, here = config.load(recipe, overrides), find(device, world)
    settings = settle(settings, here.memory, world, device=here.kind)
    asked = case(settings, world=world, device=here.kind)
    rates, base = (_corrections(recipe, overrides, world, here, console)) if measured else (None, None)
    one = report.outlook(asked, here, rates, base)
    console.print(
        f"{settings.run.name}: {asked.shape.parameters:,} parameters on {world} x {here.name}, ZeRO-{asked.stage}, "
        f"{asked.precision}, {asked.micro_batch} rows x {asked.accumulation} a rank and step, T {asked.length}, "
        f"attention {asked.attention}, loss {asked.loss}",
        soft_wrap=True,
    )
    console.print(report.by_part(one))
    rows = report.alternatives(one, settings, rates, base)
    console.print(report.grid(rows, asked))
    for line in (report.plan_line(one, settings), *report.advice(one, rows)):
        console.print(line, soft_wrap=True)


def _corrections(
    recipe: str, overrides: list[str], world: int, device: Device, console: Console
) -> tuple[Rates, float]:
    """The constants, and the memory of the rest, as a real run on this machine says."""
    import torch

    gpus = torch.cuda.device_count()
    if device.kind == "cuda" and not gpus:
        raise UserError(Problem("--measure runs on this machine", "no CUDA device", "--device cpu", "--device"))
    ranks = min(world, gpus if device.kind == "cuda" else num_cores())
    here = find(device.name, ranks)
    asked = case(
        settle(config.load(recipe, overrides), here.memory, ranks, device=here.kind), world=ranks, device=here.kind
    )
    expected = report.outlook(replace(asked, saves=False), here)
    compiles = "on" if asked.compiled_update else "off"  # `auto` would find a plan of few steps too short for it
    found = measure(recipe, [*overrides, f"engine.device={device.kind}", f"engine.compile={compiles}"], ranks)
    console.print(
        f"measured here, {ranks} x {here.name}: step {found.step_s:.3f} s, estimated {expected.speed.step_s:.3f} s; "
        f"memory {found.peak_bytes / GIB:.2f} GiB, estimated {expected.memory.total / GIB:.2f} GiB",
        soft_wrap=True,
    )
    base = found.peak_bytes - memory(expected.case, 0.0).total
    return corrected(rates_of(here.kind), expected.speed.step_s, found.step_s), max(0.0, base)
