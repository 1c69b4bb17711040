"""When gradients are reduced: one rule, the same for engine and estimates, and true of DeepSpeed's classes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from smoltrain.config.load import DS_CONFIGS_FOLDER
from smoltrain.config.schema import Config
from smoltrain.engine.deepspeed_json import fill_deepspeed_config
from smoltrain.engine.reduction import (
    MemoryForSums,
    ReductionChoice,
    check_reduction,
    choose_reduction,
    gradient_dtypes,
    gradient_sum_dtype,
    why_not_once_per_step,
)
from smoltrain.errors import UserError
from smoltrain.estimate.training_setup import build_training_setup
from tests import tiny
from tests.engines import Odd
from tests.ranks import world

FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}


def tree_of(stage: int, precision: str = "fp32", **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage}, precision: {"enabled": True}, **FP32_SUMS, **more}


def test_what_is_said_of_dtypes_is_what_the_file_says() -> None:
    assert gradient_dtypes({**FP32_SUMS, "bf16": {"enabled": True}}) == ("fp32", "fp32")
    assert gradient_dtypes({}) == ("fp32", "fp32")
    assert str(gradient_dtypes({})) == "fp32 accumulation and reduction"
    assert str(gradient_dtypes({"fp16": {"enabled": True}})) == "fp16 accumulation and reduction"
    mixed = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    assert str(gradient_dtypes(mixed)) == "fp32 accumulation, bf16 reduction"


def test_sums_are_in_fp32_unless_there_is_nothing_to_add_up() -> None:
    assert gradient_sum_dtype(torch.bfloat16, accumulation=1, world_size=1) == torch.bfloat16
    assert gradient_sum_dtype(torch.bfloat16, accumulation=2, world_size=1) == torch.float32
    assert gradient_sum_dtype(torch.bfloat16, accumulation=1, world_size=2) == torch.float32


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        (tree_of(1), None),
        (tree_of(2), None),
        (tree_of(2, "bf16"), None),
        (tree_of(2, "bf16", zero_optimization={"stage": 2, "offload_optimizer": {"device": "none"}}), None),
        (tree_of(0), "ZeRO-0 has no partitions"),
        (tree_of(3, "bf16"), "ZeRO-3 is computed by DeepSpeedZeroOptimizer_Stage3"),
        (tree_of(1, "bf16"), "ZeRO-1 in bf16 is computed by BF16_Optimizer"),
        (tree_of(2, "fp16"), "fp16 has a loss scale"),
        (tree_of(2, zero_optimization={"stage": 2, "offload_optimizer": {"device": "cpu"}}), "offloaded"),
        (tree_of(2, zero_optimization={"stage": 2, "cpu_offload": True}), "offloaded"),
        (tree_of(2, "bf16", data_types={}), "bf16 accumulation, fp32 reduction"),
        (tree_of(2, "bf16", communication_data_type="bf16"), "fp32 accumulation, bf16 reduction"),
    ],
)
def test_the_reason_is_named(tree: dict[str, Any], reason: str | None) -> None:
    found = why_not_once_per_step(tree)
    assert found == reason if reason is None else reason in str(found)
    for requested in ("auto", "step", "micro_batch"):
        choice = choose_reduction(tree, device="cpu", requested=requested)
        assert choice.once_per_step == (reason is None and requested != "micro_batch")
        assert reason is None or choice.reason == found
    if reason is None:
        check_reduction(tree, "step")
    else:
        check_reduction(tree, "auto")
        with pytest.raises(UserError, match="gradients cannot be reduced once per step"):
            check_reduction(tree, "step")


def on_a_gpu(requested: str, memory: MemoryForSums | None = None) -> ReductionChoice:
    return choose_reduction(tree_of(2), device="cuda", requested=requested, memory=memory)


def test_on_a_gpu_it_is_once_per_step_wherever_the_sums_fit() -> None:
    GIB = 2.0**30
    roomy = MemoryForSums(with_sums_bytes=4 * GIB, without_bytes=3 * GIB, usable_bytes=4 * GIB)
    fits = ReductionChoice(True, "auto: 4.00 GiB with its sums of 4.00 GiB, as estimated")
    assert on_a_gpu("auto", roomy) == fits
    tight = MemoryForSums(with_sums_bytes=4 * GIB, without_bytes=3 * GIB, usable_bytes=3.9 * GIB)
    assert on_a_gpu("auto", tight) == ReductionChoice(False, "auto: 4.00 GiB with its sums of 3.90 GiB, as estimated")
    buckets = MemoryForSums(with_sums_bytes=4 * GIB, without_bytes=5 * GIB, usable_bytes=3.9 * GIB)
    assert on_a_gpu("auto", buckets).once_per_step, "DeepSpeed's buckets would take more than the sums"
    assert on_a_gpu("auto").once_per_step
    for memory in (roomy, tight):
        assert on_a_gpu("step", memory) == ReductionChoice(True, "as engine.reduce_gradients asks")
        assert on_a_gpu("micro_batch", memory) == ReductionChoice(False, "as engine.reduce_gradients asks")
        on_a_cpu = choose_reduction(tree_of(2), device="cpu", requested="auto", memory=memory)
        assert on_a_cpu == ReductionChoice(True, "auto, on a CPU"), "whose ranks share their memory"


# ---- the same in engine and estimate


def is_zero_optimizer(settings: Config) -> tuple[bool, str]:
    """(whether DeepSpeed took the class that OncePerStep works on, the engine's line); runs on every rank."""
    from smoltrain.engine.build_engine import build_engine
    from smoltrain.engine.deepspeed_private import DeepSpeedZeroOptimizer

    precision = settings.engine.precision
    engine = build_engine(Odd(), settings, world(), precision=precision, accumulation=2)
    return isinstance(engine._deepspeed.optimizer, DeepSpeedZeroOptimizer), engine.reduction


def other_config(folder: Path, **options: Any) -> str:
    """zero2 with other options."""
    tree = json.loads((DS_CONFIGS_FOLDER / "zero2.json").read_text())
    path = folder / "other.json"
    path.write_text(json.dumps(tree | options))
    return str(path)


@pytest.mark.parametrize(
    ("name", "precision"),
    [("zero0", "fp32"), ("zero1", "fp32"), ("zero1", "bf16"), ("zero2", "fp32"), ("zero2", "bf16"), ("zero3", "bf16"),
     ("bf16 sums", "bf16")],
)  # fmt: skip
def test_rule_engine_and_estimate_agree(tmp_path: Path, ranks: Any, name: str, precision: str) -> None:
    if name == "bf16 sums":
        name = other_config(tmp_path, data_types={"grad_accum_dtype": "bf16"}, communication_data_type="bf16")
    settings = tiny.load(tmp_path, f"engine.ds_config={name}", f"engine.precision={precision}")
    tree = fill_deepspeed_config(settings, precision=precision, accumulation=2, world_size=1)
    [(zero_optimizer, line)] = ranks(1).run(is_zero_optimizer, settings)
    reason = why_not_once_per_step(tree)
    assert line.startswith("once per step, no") == (reason is None)
    assert reason is None or f"by DeepSpeed ({reason})" in line
    assert zero_optimizer or reason is not None, "DeepSpeed took a class that OncePerStep does not know"
    setup = build_training_setup(settings, world=1, device="cpu")
    assert setup.once_per_step == (reason is None)


def test_an_estimate_knows_of_offload(tmp_path: Path) -> None:
    settings = tiny.load(tmp_path, "engine.ds_config=zero2_offload", "engine.precision=bf16")
    assert not build_training_setup(settings, world=1, device="cpu").once_per_step
