"""The roofline of a GPU's step against what torch counts of a real decoder on a CPU, and against published runs."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from smoltrain.config.load import load_config
from smoltrain.estimate.constants import GPUS
from smoltrain.estimate.roofline import WAITING, KernelWork, list_block_work, list_work
from smoltrain.estimate.speed import estimate_speed
from smoltrain.estimate.training_setup import TrainingSetup, build_training_setup
from smoltrain.kernels.attention import AttentionKernel
from smoltrain.kernels.loss import LossKernel
from smoltrain.model import decoder, layers
from smoltrain.model.decoder import build_decoder
from smoltrain.model.interface import ComputeOptions
from tests.estimate.setups import SMOL, make_setup

H200 = GPUS["h200"]
LLAMA = (
    "model.hidden_size=192", "model.num_attention_heads=6", "model.num_key_value_heads=2", "model.vocab_size=1024",
    "model.intermediate_size=512", "batch.sequence_length=64", "batch.micro_batch=2", "batch.rows_per_step=2",
)  # fmt: skip
GPT2 = (*LLAMA, "model.mlp=gelu", "model.positions=learned", "model.num_key_value_heads=6")
ROWS_2048 = ("batch.sequence_length=2048", "batch.micro_batch=16", "batch.rows_per_step=16")


class Counted(TorchDispatchMode):
    """Operations that start a kernel, and the bytes of the tensors that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.elementwise_bytes = 0  # neither products nor attention

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        is_view = any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns)
        # A clone: torch's attention for CPUs wants other strides than those for GPUs.
        if is_view or name.startswith(("empty", "new_empty", "_unsafe_view", "detach", "clone")):
            return out
        self.operations += 1
        if name != "mm" and "attention" not in name:
            tensors = [x for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor) and not x.is_sparse]
            self.elementwise_bytes += sum(x.nbytes for x in tensors)
        return out


def build(words: tuple[str, ...], mode: Any = "none", attention: Any = "sdpa") -> Callable[[], torch.Tensor]:
    """The loss of a micro-batch, whose backward is to come."""
    kernel = AttentionKernel(attention, "as the test asks")
    options = ComputeOptions(mode, kernel, LossKernel("fused", "as the test asks"))
    model = build_decoder(load_config(SMOL, words).model, options, "cpu").bfloat16()  # pyright: ignore[reportArgumentType]
    ids = torch.randint(1024, (2, 64))
    return lambda: model(ids, ids)


@pytest.mark.parametrize(("mode", "words"), [("none", GPT2), ("none", LLAMA), ("full", LLAMA), ("selective", LLAMA)])
def test_operations_are_those_that_torch_counts(words: tuple[str, ...], mode: Any):
    words = (*words, "model.num_hidden_layers=2")
    with FlopCounterMode(display=False) as counted:
        build(words, mode, attention="math")().backward()
    setup = make_setup(*words, recipe=SMOL, device="cuda", recompute=mode, attention="math", loss="fused")
    estimated = sum(one.times * one.operations for one in list_work(setup, H200))
    if mode == "selective":  # it keeps no products of batches, of which `math` is made
        estimated += 2 * 4 * setup.length * setup.shape.width * setup.micro_batch_tokens
    assert estimated == counted.get_total_flops()


def test_a_flash_kernel_computes_half_of_the_pairs():
    setup = make_setup(*LLAMA, recipe=SMOL, device="cuda", attention="flash-attn")
    q = (2, 6, 64, 32)  # rows, heads, T, width: each query head computes, whoever shares its keys
    for backward, counted in ((False, sdpa_flop_count(q, q, q)), (True, sdpa_backward_flop_count(q, q, q, q))):
        work = list_block_work(setup, H200, backward=backward)
        assert sum(one.operations for one in work if one.part == "attention") == counted / 2
    once = sum(one.times * one.operations for one in list_work(setup, H200))
    joint = dataclasses.replace(setup, fused_projections=True)
    assert once == sum(one.times * one.operations for one in list_work(joint, H200))


@pytest.mark.parametrize("words", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_operations_and_bytes_of_a_block_that_is_not_compiled(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    """By the difference of two blocks and one. A GPU's RMSNorm is one operation, as LayerNorm is on both."""
    for module in (decoder, layers):
        monkeypatch.setattr(module, "make_norm", lambda model: nn.LayerNorm(model.hidden_size, bias=False))
    counts: list[tuple[Counted, Counted]] = []
    for num_layers in (1, 2):
        forward = build((*words, f"model.num_hidden_layers={num_layers}"))
        with Counted() as first:
            loss = forward()
        with Counted() as second:
            loss.backward()
        counts.append((first, second))
    setup = make_setup(*words, recipe=SMOL, device="cuda", compiled_blocks=False)
    for backward in (False, True):
        work = list_block_work(setup, H200, backward=backward)
        one, two = (count[backward] for count in counts)
        assert sum(part.launches for part in work) == two.operations - one.operations
        moved = sum(part.moved_bytes for part in work if not part.operations and part.part != "attention")
        assert moved == pytest.approx(two.elementwise_bytes - one.elementwise_bytes, rel=0.03)


def test_a_kernel_takes_the_longer_of_computing_and_moving():
    moving = KernelWork("", operations=1e9, moved_bytes=4e9, share=0.5)
    computing = KernelWork("", operations=800e12, moved_bytes=4e9, share=0.5, times=3)
    tiny = KernelWork("", moved_bytes=1, launches=5)
    seconds = [one.seconds(800e12, 4e12, at_limits=False) for one in (moving, computing, tiny)]
    assert seconds == pytest.approx([1e-3, 6.0, 10e-6]), "a kernel takes 2 us at least"
    limits = [one.seconds(800e12, 4e12, at_limits=True) for one in (moving, computing, tiny)]
    assert limits == pytest.approx([1e-3, 3.0, 0.25e-12])


def smollm2_at_2048(**changes: Any) -> TrainingSetup:
    return make_setup(*ROWS_2048, recipe=SMOL, device="cuda", compiled_blocks=True, **changes)


def test_smollm2_on_an_h200_is_as_was_worked_out_by_hand():
    """62 ms at its limits and 99 as kernels are today: sums over the same parts, made for this shape alone."""
    speed = estimate_speed(smollm2_at_2048(), H200)
    assert sum(speed.limits.values()) == pytest.approx(0.062, rel=0.1)
    assert speed.step_s == pytest.approx(0.099, rel=0.1)
    assert speed.mfu == pytest.approx(32768 / speed.step_s * (6 * 134_515_008 + 12 * 30 * 576 * 2048) / 989e12)
    assert all(limit_s <= speed.parts[part] * (1 + 1e-9) for part, limit_s in speed.limits.items())
    page = (Path(__file__).parents[2] / "docs" / "estimate.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| (.+) \| ([\d.]+) \| [\d.-]+ \| ([\d.]+) \| [\d.-]+ \|", page)
    assert len(rows) == 8
    for row in rows:
        parts = {"gradients, update": ("gradients", "update"), "in all": tuple(speed.parts)}.get(row[0], (row[0],))
        limit_s = sum(speed.limits.get(part, 0.0) for part in parts)
        assert [f"{1000 * limit_s:.1f}", f"{1000 * sum(speed.parts[part] for part in parts):.1f}"] == [*row[1:]], row[0]


@pytest.mark.parametrize(("name", "mfu"), [("llm.c on 8 x H100", 0.41), ("llm-foundry on 8 x A100", 0.448)])
def test_published_runs_of_this_size(name: str, mfu: float):
    """GPT-2 124M at T 1024, 64 rows a rank, kernels fused by hand; MPT-125M at T 2048, 16 rows, with plain logits."""
    sides = ((768, 2304), (768, 768), (768, 3072), (3072, 768))
    setup = smollm2_at_2048()
    shape = dataclasses.replace(
        setup.shape, parameters=124_475_904, matmul_parameters=123_689_472, vocabulary=50304, width=768, layers=12,
        heads=12, kv_heads=12, inner=3072, hidden_matrices=sides * 12, gated=False, rmsnorm=False, rotary=False,
    )  # fmt: skip
    setup = dataclasses.replace(setup, shape=shape, world=8, fused_projections=True)
    if name.startswith("llm.c"):
        speed = estimate_speed(dataclasses.replace(setup, length=1024, micro_batch=64), GPUS["h100"])
    else:
        speed = estimate_speed(dataclasses.replace(setup, loss="plain", compiled_blocks=False), GPUS["a100-80"])
    assert speed.mfu == pytest.approx(mfu, rel=0.1)


def test_a_small_model_waits_for_the_host():
    quickstart = build_training_setup(load_config("quickstart", []), world=1, device="cuda")
    speed = estimate_speed(quickstart, H200)
    assert speed.step_s == pytest.approx(0.0094, abs=0.0001)
    assert speed.host is not None
    assert speed.parts[WAITING] > 0.8 * speed.step_s
    assert speed.step_s == pytest.approx(speed.host.seconds)
    assert WAITING not in speed.limits
    large = estimate_speed(smollm2_at_2048(), H200)
    assert large.parts[WAITING] == 0
    assert large.host is not None
    assert large.host.seconds < large.step_s


def host_s(setup: TrainingSetup) -> float:
    host = estimate_speed(setup, H200).host
    assert host is not None
    return host.seconds


def test_choices_change_the_parts_that_they_are_about():
    setup = smollm2_at_2048()
    changed = {
        "eager": dataclasses.replace(setup, compiled_blocks=False),
        "whole": dataclasses.replace(setup, compiled_whole=True),
        "replayed": dataclasses.replace(setup, compiled_whole=True, cuda_graphs=True),
        "joint": dataclasses.replace(setup, fused_projections=True),
        "math": dataclasses.replace(setup, attention="math"),
        "plain": dataclasses.replace(setup, loss="plain"),
        "full": dataclasses.replace(setup, recompute="full"),
        "every 3.": dataclasses.replace(setup, recompute=3),
    }
    now = estimate_speed(setup, H200)
    parts = {name: estimate_speed(other, H200).parts for name, other in changed.items()}
    differ = {name: {part for part in other if other[part] != now.parts[part]} for name, other in parts.items()}
    elementwise = "norms, rotary, sums"
    assert differ["eager"] == {elementwise}
    assert differ["whole"] == differ["replayed"] == set()
    assert differ["joint"] == {"q, k, v, o", "MLP", elementwise}
    assert differ["math"] == {"attention"}
    assert differ["plain"] == {"head and loss"}
    assert differ["full"] == differ["every 3."] == {"recomputed"}
    assert parts["full"]["recomputed"] == pytest.approx(3 * parts["every 3."]["recomputed"])
    assert parts["joint"]["MLP"] < now.parts["MLP"]
    assert host_s(changed["replayed"]) < host_s(changed["whole"]) < host_s(setup) < host_s(changed["eager"])
    assert host_s(changed["joint"]) < host_s(setup) < host_s(changed["full"])


def test_zero_stages_differ():
    words = ("batch.sequence_length=2048", "batch.micro_batch=4", "batch.accumulation=4", "engine.precision=fp32")
    setup = make_setup(*words, recipe=SMOL, device="cuda", world=8)
    by_stage = [estimate_speed(setup.with_zero_stage(stage), GPUS["h100"]) for stage in (0, 1, 2, 3)]
    updates = [speed.parts["update"] for speed in by_stage]
    assert updates[0] > 4 * updates[1] == 4 * updates[2]
    assert by_stage[3].parts["reduction"] > by_stage[2].parts["reduction"]
    reduced_often = dataclasses.replace(setup, once_per_step=False)
    hosts = [host_s(setup), host_s(reduced_often), host_s(setup.with_zero_stage(3))]
    assert hosts == sorted(set(hosts))
