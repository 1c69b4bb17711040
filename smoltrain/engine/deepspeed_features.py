"""What of DeepSpeed's JSON is refused: slips in a key, and switches that do nothing, or make a run's words untrue.

DeepSpeed would accept each of them, and some of them silently: gradients that are reduced once per step never pass
through its own forward and step (once_per_step.py).
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smoltrain.errors import Problem

# What is read of these, here or by DeepSpeed, is read of an object.
SECTIONS = (
    "data_types", "zero_optimization.offload_optimizer", "zero_optimization.offload_param", "torch_autocast",
    "flops_profiler", "tensorboard", "wandb", "csv_monitor", "comet", "tensor_parallel", "data_efficiency",
    "checkpoint",
)  # fmt: skip
MAY_BE_NULL = ("zero_optimization.offload_optimizer", "zero_optimization.offload_param")

DTYPE_KEYS = ("data_types.grad_accum_dtype", "communication_data_type")
DTYPE_NAMES = {
    "fp32": "fp32", "float32": "fp32", "float": "fp32", "torch.float32": "fp32",
    "bf16": "bf16", "bfloat16": "bf16", "torch.bfloat16": "bf16",
    "fp16": "fp16", "float16": "fp16", "half": "fp16", "torch.float16": "fp16",
}  # fmt: skip

PRECISION = "engine.precision"
SINKS = "track.to and track.wandb"
OWN_ROWS = "1: each rank trains on rows of its own"
FP32_MASTERS = "false: the master weights are fp32"
WITH_CHECKPOINTS = "cpu: a checkpoint would lack what lies elsewhere"

# Key -> the values that are fine beside its absence, and what is wanted in place of any other.
REFUSED_FEATURES: dict[str, tuple[tuple[Any, ...], str]] = {
    "torch_autocast.enabled": ((False,), f"{PRECISION}, by which the run says how it computes"),
    "flops_profiler.enabled": ((False,), "`smoltrain profile`"),
    "tensorboard.enabled": ((False,), SINKS),
    "wandb.enabled": ((False,), SINKS),
    "csv_monitor.enabled": ((False,), f"{SINKS}, beside RUN/metrics.jsonl"),
    "comet.enabled": ((False,), SINKS),
    "data_efficiency.enabled": ((False,), "the keys of the recipe's data section"),
    "tensor_parallel.autotp_size": ((0, 1), OWN_ROWS),
    "sequence_parallel_size": ((1,), OWN_ROWS),
    "bf16.bf16_master_weights_and_grads": ((False,), FP32_MASTERS),
    "bf16.bf16_optimizer_states": ((False,), "false: the optimizer's state is fp32"),
    "fp16.fp16_master_weights_and_grads": ((False,), FP32_MASTERS),
    "zero_optimization.offload_optimizer.device": (("cpu", "none"), WITH_CHECKPOINTS),
    "zero_optimization.offload_param.device": (("cpu", "none"), WITH_CHECKPOINTS),
    "zero_optimization.load_from_fp32_weights": ((True,), "true: a resume begins with the fp32 master weights"),
    "zero_optimization.elastic_checkpoint": ((False,), "false: no run goes on from what DeepSpeed writes then"),
    "zero_optimization.zenflow": ((), "no such section: it takes an optimizer of DeepSpeed's own"),
    "checkpoint.load_universal": ((False,), "false: a resume reads the run's own checkpoints"),
}


# What DeepSpeed 0.19 reads at the top of its JSON; tests/engine/test_deepspeed_features.py looks into its source.
TOP_KEYS = (
    "activation_checkpointing", "aio", "autotuning", "bf16", "bfloat16", "checkpoint", "comet", "comms_logger",
    "communication_data_type", "compile", "compression_training", "csv_monitor", "data_efficiency", "data_types",
    "dataloader_drop_last", "datastates_ckpt", "disable_allgather", "disable_python_gc", "dump_state", "elasticity",
    "expert_parallel", "flops_profiler", "fp16", "gradient_accumulation_steps", "gradient_allreduce_op",
    "gradient_clipping", "gradient_predivide_factor", "hybrid_engine", "log_level", "managed_gradient_accumulation",
    "memory_breakdown", "optimizer", "pipeline", "prescale_gradients", "scheduler",
    "seq_parallel_communication_data_type", "sequence_parallel_size", "steps_per_print", "tensor_parallel",
    "tensorboard", "timers", "torch_autocast", "train_batch_size", "train_micro_batch_size_per_gpu",
    "use_data_before_expert_parallelism", "vocabulary_size", "wall_clock_breakdown", "wandb",
    "weight_quantization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
)  # fmt: skip
NEAR = 0.85  # of difflib's ratio: a slip of the keyboard


def check_spelling(tree: Mapping[str, Any], path: Path) -> list[Problem]:
    """Keys at the top of which DeepSpeed reads none, but a similar one; it would leave them out without a word."""
    problems: list[Problem] = []
    for key in tree:
        near = difflib.get_close_matches(key, TOP_KEYS, n=1, cutoff=NEAR)
        if key not in TOP_KEYS and near:
            what = f"{path.name} has a key that DeepSpeed does not read"
            problems.append(Problem(what, key, near[0], f"{path}: {key}"))
    return problems


def check_sections(tree: Mapping[str, Any], path: Path) -> list[Problem]:
    """Sections of DeepSpeed's JSON that are no objects, and precisions that it does not know."""
    problems: list[Problem] = []
    for key in SECTIONS:
        value = find_value(tree, key, {})
        if not isinstance(value, dict) and not (value is None and key in MAY_BE_NULL):
            what = f"{path.name} has a section that is no object"
            problems.append(Problem(what, f"{key} = {value!r}", '{"key": value, ...}', str(path)))
    for key in DTYPE_KEYS:
        value = find_value(tree, key)
        if value is not None and str(value) not in DTYPE_NAMES:
            what = f"{path.name} has a precision that DeepSpeed does not know"
            problems.append(Problem(what, f"{key} = {value!r}", '"fp32", "bf16" or "fp16"', str(path)))
    return problems


def check_features(tree: Mapping[str, Any], path: Path) -> list[Problem]:
    """What is refused of DeepSpeed's JSON, whose sections are objects."""
    problems: list[Problem] = []
    for key, (fine, want) in REFUSED_FEATURES.items():
        value = find_value(tree, key)
        if value is not None and value not in fine:
            what = f"{path.name} asks for what smoltrain does in another way, or not at all"
            problems.append(Problem(what, f"{key} = {value!r}", want, f"{path}: {key}"))
    return problems


def name_dtypes(tree: dict[str, Any]) -> None:
    """Write fp32, bf16 and fp16 for the other names that DeepSpeed has for them, in one key and not in the other."""
    types = tree.get("data_types", {})
    for section, key in ((types, "grad_accum_dtype"), (tree, "communication_data_type")):
        if section.get(key) is not None:
            section[key] = DTYPE_NAMES[str(section[key])]


def find_value(tree: Mapping[str, Any], key: str, absent: Any = None) -> Any:
    """The value at a dotted key; `absent` where it, or a section on the way to it, is not there."""
    node: Any = tree
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return absent
        node = node[part]
    return node
