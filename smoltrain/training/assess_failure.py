"""A failure for want of memory beside the estimate of its run, with the settings that would fit."""

from dataclasses import replace

import torch

from smoltrain.config.schema import Config
from smoltrain.errors import UserError
from smoltrain.estimate.devices import find_device_of_run
from smoltrain.estimate.fitting import fit_config_to_memory, settle_reduction
from smoltrain.estimate.report import Estimate
from smoltrain.estimate.smaller_settings import find_smaller_settings
from smoltrain.estimate.training_setup import DeviceKind, Resolved, build_training_setup
from smoltrain.training.memory_page import MemoryFailure
from smoltrain.training.start import Start

NOTHING_FITS = (
    "no micro-batch, recomputation or ZeRO stage is estimated to fit: a smaller model, shorter rows, or more memory"
)


def assess_failure(
    failure: MemoryFailure, start: Start, device: torch.device, local_size: int,
    settled: tuple[Config, Resolved] | None = None,
) -> MemoryFailure:  # fmt: skip
    """The same beside the estimate of this run, with the settings that would fit, as far as these can be known.

    `settled`: the config that trains with what its start has chosen; None where that is not known.
    """
    kind: DeviceKind = "cuda" if device.type == "cuda" else "cpu"
    world_size = failure.num_ranks
    try:
        spec, speeds = find_device_of_run(device, start.cpu_peak_flops, local_size)
        spec = replace(spec, memory=failure.limit.num_bytes)
        resolved: Resolved = {"rows_per_step": start.rows_per_step}
        if settled:
            config, chosen = settled
            resolved.update(chosen)
        else:
            config = fit_config_to_memory(start.config, spec.memory, world_size, device=kind, **resolved)
        setup = settle_reduction(build_training_setup(config, world=world_size, device=kind, **resolved), spec.memory)
    except UserError as error:
        return replace(failure, advice=f"a smaller batch.micro_batch or model ({error.problems[0].what})")
    estimate = Estimate(setup, spec)
    beyond = max(0.0, failure.needed - estimate.memory.total)
    settings = find_smaller_settings(estimate, config, spec.memory, beyond)
    return replace(failure, estimate=estimate, settings=settings, speeds=speeds, advice=NOTHING_FITS)
