"""DeepSpeed, and every name of it that it does not document and that smoltrain depends on. The only importer of it.

Another version may rename what is its own business. Some renames would be silent: a build of a minute at
each start, a script in checkpoints that unpickles anything, gradients that are reduced twice, ranks that
outlive their launcher. So each name is looked for when this module is imported, and one error names those
that are gone.
"""

import contextlib
import functools
import importlib
import inspect
import logging
import os
import sys
from collections.abc import Iterator
from types import CodeType
from typing import Any, NamedTuple

import torch

from smoltrain.distributed.communication import CollectiveKind, choose_reduce_scatter
from smoltrain.distributed.stop import DEEPSPEED_LAUNCHER
from smoltrain.distributed.world import World
from smoltrain.engine import reshard
from smoltrain.errors import Problem, UserError
from smoltrain.files import exception_title, first_line

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns and guesses
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

# DeepSpeed's autotuner, which it imports and nobody here uses, would import mlflow where it is installed, and with it
# pandas and scipy: seconds. Under None it takes it for not installed.
if "mlflow" not in sys.modules:
    sys.modules["mlflow"] = None  # pyright: ignore[reportArgumentType]

import deepspeed
import pydantic
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS, ZeRORuntimeException
from deepspeed.utils import safe_get_full_grad
from deepspeed.utils.tensor_fragment import fragment_address

if sys.modules["mlflow"] is None:
    del sys.modules["mlflow"]

__all__ = [
    "ZERO_SUPPORTED_OPTIMIZERS", "CheckpointEngine", "DeepSpeedZeroOptimizer", "DynamicLossScaler", "LossScaler",
    "ZeroStageEnum", "deepspeed", "fragment_address", "safe_get_full_grad",
]  # fmt: skip

TESTED_VERSIONS = ("0.19.8",)

_ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"
_ZERO = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
_ZERO3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
_BF16 = "deepspeed.runtime.bf16_optimizer:BF16_Optimizer"
_FRAGMENT = "deepspeed.utils.tensor_fragment"

# By their names in DeepSpeed; None: a reduce-scatter, which is another kind on another device.
COLLECTIVES: dict[str, CollectiveKind | None] = {
    "all_reduce": "all-reduce",
    "all_reduce_coalesced": "all-reduce",
    "inference_all_reduce": "all-reduce",
    "all_gather": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "all_gather_coalesced": "all-gather",
    "reduce_scatter": None,
    "reduce_scatter_tensor": None,
    "broadcast": "broadcast",
    "reduce": "reduce",
}

# Owner -> names. A module or a class has the name; a function uses it in its code, as the name of what it calls, sets
# or reads, or as a word of text: of attributes that `__init__` sets nothing else is known before there is an object.
PRIVATE_NAMES = {
    # A C++ build of a minute that only CPU inference uses is put aside.
    "deepspeed.comm.torch": "build_shm_op",
    "deepspeed.comm.torch:TorchBackend.__init__": "build_shm_op",
    # The object through which all of its collectives go.
    "deepspeed.comm.comm": "cdb",
    "deepspeed.comm.torch:TorchBackend": " ".join(COLLECTIVES),
    # Files: our own access to them, and what they are called.
    _ENGINE: "_get_all_ckpt_names _get_zero_param_shapes _copy_recovery_script",
    f"{_ENGINE}._save_zero_checkpoint": "_copy_recovery_script checkpoint_engine optimizer_state_dict",
    f"{_ENGINE}._load_checkpoint": "_get_all_ckpt_names checkpoint_engine",
    f"{_ENGINE}._common_checkpoint_state": "dp_world_size ds_config param_shapes module",
    f"{_ENGINE}.__init__": "global_steps global_samples micro_steps config",
    f"{_ENGINE}._set_distributed_vars": "global_rank",
    f"{_ENGINE}._configure_distributed_model": "dp_world_size",
    # Steps that DeepSpeed takes.
    f"{_ENGINE}.is_gradient_accumulation_boundary": "micro_steps",
    f"{_ENGINE}.step": "micro_steps",
    f"{_ZERO}.__init__": "check_grad_overflow compute_grad_norm cpu_offload overflow optimizer "
    "bit16_groups bit16_groups_flat _grad_acc_hooks averaged_gradients "
    "parallel_partitioned_bit16_groups single_partition_of_fp32_groups",
    f"{_ZERO}.step": "check_grad_overflow check_overflow compute_grad_norm scaled_global_norm is_invalid_grad_norm "
    "overflow _update_scale",
    f"{_ZERO3}.__init__": "optimizer fp32_partitioned_groups_flat sub_group_to_group_id averaged_gradients",
    _ZERO3: "has_overflow _overflow_clean_up",
    # Where the masters lie, for Muon.
    f"{_BF16}.__init__": "fp32_groups_flat_partition fp32_groups_gradients_flat",
    "deepspeed.runtime.zero.partition_parameters:Init._partition_numel": "ds_tensor",
    # Steps that OncePerStep takes.
    f"{_ZERO}.create_gradient_handling_hooks": "_grad_acc_hooks",
    _ZERO: "_optimizer_step _update_model_bit16_weights _lazy_init_hp_params_optimizer_state "
    "check_overflow _update_scale update_lp_params",
    "deepspeed.utils.mixed_precision_linkage:link_hp_params": "_hp_mapping",
    f"{_FRAGMENT}:tensor_fragment": "lp_fragment lp_fragment_address",
    f"{_FRAGMENT}:fragment_address": "start numel",
    "deepspeed.runtime.zero.partition_parameters:Init._convert_to_deepspeed_param": "ds_numel",
    # A process that trains again, on another device perhaps.
    "deepspeed.accelerator.real_accelerator": "ds_accelerator",
    "deepspeed.accelerator.real_accelerator:get_accelerator": "ds_accelerator DS_ACCELERATOR",
    # A rank whose launcher is gone stops: the launcher is known by its command line.
    "deepspeed.launcher.runner:main": DEEPSPEED_LAUNCHER,
}

# Keys of the optimizer state in checkpoints: DeepSpeed's constants, and the copies by which we reshard without it.
STATE_KEYS = {
    "SINGLE_PARTITION_OF_FP32_GROUPS": reshard.MASTER_KEYS[0],
    "FP32_FLAT_GROUPS": reshard.MASTER_KEYS[1],
    "BASE_OPTIMIZER_STATE": reshard.OPTIMIZER_KEYS[0],
    "OPTIMIZER_STATE_DICT": reshard.OPTIMIZER_KEYS[1],
    "PARAM_ALIGNMENT_PADDINGS": reshard.GAPS_KEY,
    "LOSS_SCALER": reshard.LOSS_SCALER_KEY,
    "FROZEN_PARAM_FRAGMENTS": reshard.FROZEN_KEY,
}


class PrivateName(NamedTuple):
    """A name, and where it is looked for: module, module:Class or module:Class.function."""

    owner: str
    name: str


def list_private_names() -> list[PrivateName]:
    """PRIVATE_NAMES, one by one."""
    return [PrivateName(owner, name) for owner, names in PRIVATE_NAMES.items() for name in names.split()]


def check_private_names() -> None:
    """Errors: UserError that names whatever this version of DeepSpeed lacks."""
    lost = [f"{name} in {owner}" for owner, name in list_private_names() if not _has_name(owner, name)]
    constants = importlib.import_module("deepspeed.checkpoint.constants")
    lost += [f"{name} in deepspeed.checkpoint.constants" for name in STATE_KEYS if not hasattr(constants, name)]
    lost += [
        f"{name} = {key!r} in deepspeed.checkpoint.constants"
        for name, key in STATE_KEYS.items()
        if getattr(constants, name, key) != key
    ]
    if lost:
        raise UserError(
            Problem(
                f"DeepSpeed {deepspeed.__version__} is not the one that smoltrain knows",
                saw=f"no {', no '.join(lost)}",
                want=f"version {' or '.join(TESTED_VERSIONS)}, the tested one",
                change=f"the environment: pip install deepspeed=={TESTED_VERSIONS[-1]}",
            )
        )


def find_owner(owner: str) -> Any:
    """The module, class or function. Errors: ImportError, AttributeError."""
    module, _, path = owner.partition(":")
    found = importlib.import_module(module)
    for part in path.split(".") if path else ():
        found = getattr(found, part)
    return found


def choose_accelerator(device: str) -> None:
    """Let DeepSpeed compute on this type of device from here on: it chooses once, by a variable, for a whole process.

    A rank sets the variable before it imports DeepSpeed; a program may train on the CPU first, then on a GPU.
    """
    real_accelerator = importlib.import_module("deepspeed.accelerator.real_accelerator")
    if real_accelerator.get_accelerator().device_name() != device:
        os.environ["DS_ACCELERATOR"] = device
        setattr(real_accelerator, "ds_accelerator", None)  # noqa: B010
        real_accelerator.get_accelerator()


@contextlib.contextmanager
def refuse_what_deepspeed_refuses(ds_config: str) -> Iterator[None]:
    """Errors: UserError for a key or value of the config that DeepSpeed does not take, or takes no more."""
    problem = functools.partial(
        Problem, "DeepSpeed refuses its config", want=f"what DeepSpeed {deepspeed.__version__} takes",
        change=f"engine.ds_config = {ds_config}",
    )  # fmt: skip
    try:
        yield
    except DeepSpeedConfigError as error:
        raise UserError(problem(saw=first_line(error))) from None
    except pydantic.ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise UserError(problem(saw=f"{error.title}: {', '.join(faults)}")) from None
    except (AssertionError, NotImplementedError, ValueError, ZeRORuntimeException) as error:  # how most is refused
        raise UserError(problem(saw=exception_title(error))) from error


def meter_collectives(world: World) -> None:
    """Have the collectives of DeepSpeed counted by the world's meter too, once DeepSpeed has joined its group.

    Its own logger of them (comms_logger) would wait for the device after each, and keep a list that grows for ever.
    """
    backend = importlib.import_module("deepspeed.comm.comm").cdb
    for name, kind in COLLECTIVES.items():
        collective = functools.partial(getattr(type(backend), name), backend)  # an earlier engine's meter is replaced
        kind_here = kind or choose_reduce_scatter(world.device.type)
        setattr(backend, name, world.meter.metered(collective, kind_here, backend.get_world_size))


def close_deepspeed() -> None:
    """Destroy the process groups that DeepSpeed holds, if it does, so that the same process can train again."""
    if deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()


def _has_name(owner: str, name: str) -> bool:
    try:
        found = find_owner(owner)
    except (ImportError, AttributeError):
        return False
    if inspect.isfunction(found):
        return name in _words_of_code(inspect.unwrap(found).__code__)
    return hasattr(found, name) or name in inspect.get_annotations(found)


def _words_of_code(value: Any) -> Iterator[str]:
    """Names and texts in a function's code, inner functions included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _words_of_code(part)
    elif isinstance(value, CodeType):
        yield from _words_of_code((value.co_names, value.co_consts))


check_private_names()
# As an attribute, deepspeed.comm.torch is torch itself.
setattr(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None)  # noqa: B010
