"""What a recipe will take of this machine, by smoltrain's own estimate."""

import contextlib
from dataclasses import dataclass
from typing import Literal

from smoltrain.config.schema import Config
from smoltrain.distributed.memory_limits import find_shared_limit
from smoltrain.errors import UserError

CPU_RANKS = 2  # of `smoltrain train` on a machine without a GPU


@dataclass(frozen=True)
class RunNeeds:
    """Bytes of one rank's memory, and of the checkpoints."""

    ranks: int
    device: Literal["cpu", "cuda"]
    memory_bytes: float  # of one rank
    device_bytes: float  # that one rank's device has
    checkpoint_bytes: int  # of one
    num_checkpoints: int  # at the fullest


def estimate_needs(config: Config, ranks: int, gpu_bytes: float | None) -> RunNeeds:
    """Of so many ranks, on GPUs of so many bytes; None: on this machine's CPU. Errors: UserError.

    Where the rows of a step do not divide among them, a run trains on fewer: these are counted.
    """
    from smoltrain.engine.optimizer import checkpoint_bytes  # and torch with it
    from smoltrain.estimate.fitting import build_fitted_setup, fit_config_to_memory
    from smoltrain.estimate.horizon import resolve_config
    from smoltrain.estimate.memory import estimate_memory
    from smoltrain.estimate.report import max_num_checkpoints
    from smoltrain.run.run_folder import choose_training_ranks
    from smoltrain.schedule import Plan

    ranks = choose_training_ranks(config, config.batch.rows(ranks), ranks)
    device: Literal["cpu", "cuda"] = "cpu" if gpu_bytes is None else "cuda"
    memory = find_shared_limit().num_bytes / ranks if gpu_bytes is None else gpu_bytes
    count = config.checkpoint.keep_last + config.checkpoint.keep_best + 1
    with contextlib.suppress(UserError):  # epochs of data that are not prepared yet
        config = resolve_config(config, config.batch.rows(ranks))
        count = max_num_checkpoints(Plan(config.phases), config)
    fitted = fit_config_to_memory(config, memory, ranks, device=device)
    setup = build_fitted_setup(fitted, memory, ranks, device=device)
    hidden = setup.shape.hidden_parameters
    size = checkpoint_bytes(setup.optimizer, hidden, setup.shape.parameters - hidden, setup.weight_bytes)
    return RunNeeds(ranks, device, estimate_memory(setup).total, memory, size, count)
