"""MFU: the share of the ranks' matmul peak that the model's own operations take, by the rule of estimate/speed.py."""

from dataclasses import dataclass

from smoltrain.config.schema import Config, OwnModelSection
from smoltrain.distributed.cpu_cores import Core, usable_cores
from smoltrain.distributed.world import World
from smoltrain.estimate.constants import TERA
from smoltrain.estimate.devices import find_gpu_peak
from smoltrain.estimate.speed import recipe_flops_per_token


@dataclass(frozen=True)
class MfuMeter:
    """What turns tokens/s into MFU; the same on every rank."""

    flops_per_token: float  # forward and backward of a target, nothing that is computed again
    peak_flops: float | None  # operations per second of all ranks together; None where no MFU can be told
    description: str  # of the peak, for the console

    def measure(self, tokens_per_s: float) -> dict[str, float]:
        """MFU under its name in the metrics; nothing where the peak is unknown."""
        if self.peak_flops is None:
            return {}
        return {"speed/mfu": tokens_per_s * self.flops_per_token / self.peak_flops}


def open_mfu_meter(config: Config, cpu_peak_flops: float | None, precision: str, world: World) -> MfuMeter:
    """For all ranks of this start. Collective.

    `cpu_peak_flops` was measured on the cores that rank 0 or its supervisor may use, before any rank was busy.
    """
    if isinstance(config.model, OwnModelSection):
        return _unknown_mfu("nobody here knows how much a program's own model computes")
    flops_per_token = recipe_flops_per_token(config)
    if world.device.type == "cpu":
        cores = list(zip(world.machines, world.gather(usable_cores()), strict=True))
        peak_flops = None if cpu_peak_flops is None else cpu_peak_flops * cores_over_first(cores)
        source = "measured on this machine"
    else:
        peaks = world.gather(find_gpu_peak(world.device, precision))
        known = [peak.flops for peak in peaks if peak.flops is not None]
        peak_flops = sum(known) if len(known) == world.size else None
        source = next((peak.source for peak in peaks if peak.flops is None), peaks[0].source)
    if peak_flops is None:
        return _unknown_mfu(source)
    of_ranks = f" over {world.size} ranks" if world.size > 1 else ""
    description = f"{peak_flops / TERA:,.2f} TFLOP/s {precision}{of_ranks}, {source}: speed/mfu is a share of it"
    return MfuMeter(flops_per_token, peak_flops, description)


def _unknown_mfu(why: str) -> MfuMeter:
    return MfuMeter(0.0, None, f"unknown ({why}), so that no speed/mfu is logged")


def cores_over_first(cores_of_ranks: list[tuple[int, list[Core]]]) -> float:
    """The cores that any rank may use, each counted once, over those that rank 0 may.

    (machine, cores) of each rank. 1 where the ranks share one machine; a launcher may have bound each to its own cores.
    """
    cores = {(machine, core) for machine, usable in cores_of_ranks for core in usable}
    return len(cores) / len(cores_of_ranks[0][1])
