"""Seconds of a step, by part: what there is to compute and to move, over what a device does of it per second.

A matmul of n tokens with p parameters takes 2np operations forward and 4np backward (Kaplan et al. 2020, section 2.1).
What is recomputed comes on top, but is not counted in MFU = tokens/s x (6N + 12 L D T) / peak (Chowdhery et al. 2022,
appendix B), so that MFU is comparable.

Legend: as memory.py, L blocks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from smoltrain.estimate.case import TrainingSetup
from smoltrain.estimate.devices import DeviceSpec
from smoltrain.estimate.memory import block_activation_bytes, num_recomputed_blocks


@dataclass(frozen=True)
class EfficiencyRates:
    """The free constants: which share of its peaks a device reaches; and what a step or a block costs at least."""

    matmul: float  # of the matmul peak
    attention: Mapping[str, float]  # of the matmul peak, by kernel
    bandwidth: float  # of the memory's
    link: float
    activation_passes: float  # how often what a block keeps is read or written, forward and backward
    launch_s: float  # of one block forward and backward, the time that the host needs to start its kernels
    eager_launch_s: float  # the same of a block that is not compiled
    step_s: float  # reductions of counts, the optimizer's own work on the host, logs
    factor: float = 1.0  # of the whole, from --measure


# GPUs: from published runs of small models (llm.c, llm-foundry: 41 and 45 % MFU), not from our own. CPUs: from eight
# shapes of 2 to 30 blocks on two cores (docs/performance.md).
CUDA_EFFICIENCY = EfficiencyRates(
    0.62, {"flash-attn": 0.45, "sdpa": 0.45, "math": 0.05}, 0.8, 0.6, 5.0, 0.8e-3, 0.8e-3, 5e-3
)
CPU_EFFICIENCY = EfficiencyRates(0.92, {"blocked": 0.24, "sdpa": 0.11, "math": 0.08}, 0.9, 0.4, 4.5, 1e-3, 6e-3, 20e-3)


def default_efficiency(kind: str) -> EfficiencyRates:
    """The free constants of a kind of device."""
    return CUDA_EFFICIENCY if kind == "cuda" else CPU_EFFICIENCY


@dataclass(frozen=True)
class SpeedEstimate:
    """Seconds of a step by part, and what follows for all ranks together."""

    parts: Mapping[str, float]
    tokens_per_s: float
    mfu: float

    @property
    def step_s(self) -> float:
        """Seconds of one optimizer step."""
        return sum(self.parts.values())


def estimate_speed(case: TrainingSetup, device: DeviceSpec, rates: EfficiencyRates | None = None) -> SpeedEstimate:
    """The estimate for `case` on this device."""
    rates = rates or default_efficiency(device.kind)
    peak, bandwidth = device.peak_flops(case.precision), device.bandwidth * rates.bandwidth
    again = num_recomputed_blocks(case) / case.shape.layers
    selective = case.recompute == "selective"
    matmul = matmul_operations(case, 0 if selective else again) / (peak * rates.matmul)
    kernel = rates.attention.get(case.attention, min(rates.attention.values()))
    attention = attention_operations(case, 0 if selective else again) / (peak * kernel)
    elementwise = (
        rates.activation_passes
        * (1 + again / 3)
        * case.tokens
        * block_activation_bytes(case)
        * case.shape.layers
        / bandwidth
    )
    elementwise += logit_bytes(case) / bandwidth
    start_s = rates.launch_s if case.compiled_blocks else rates.eager_launch_s
    launch = start_s * case.shape.layers * (1 + again / 3)  # beside the device's own work on a GPU, else before
    computing = max(matmul + attention + elementwise, launch) if case.device == "cuda" else (
        matmul + attention + elementwise + launch)  # fmt: skip
    per_step = {
        "matmuls": case.accumulation * matmul,
        "attention": case.accumulation * attention,
        "elementwise": case.accumulation * elementwise,
        "launches": case.accumulation * (computing - matmul - attention - elementwise),
        "gradients": case.accumulation * gradient_bytes(case) / bandwidth,
        "update": update_bytes(case) / bandwidth,
        "reduction": reduction_bytes(case) / (device.link * rates.link),
        "host": rates.step_s,
    }
    parts = {name: seconds * rates.factor for name, seconds in per_step.items()}
    tokens_per_s = case.tokens_per_step / sum(parts.values())
    return SpeedEstimate(parts, tokens_per_s, model_flops_utilization(case, tokens_per_s, peak))


def model_flops_utilization(case: TrainingSetup, tokens_per_s: float, peak: float) -> float:
    """Share of the peak (of one rank, operations per second) that the model's own operations take."""
    s = case.shape
    return tokens_per_s * flops_per_token(s.parameters, s.layers, s.width, case.length) / (peak * case.world)


def flops_per_token(parameters: int, layers: int, width: int, sequence_length: int) -> float:
    """Floating-point operations of forward and backward: 6 N + 12 L D T, attention counted as if it were not causal."""
    return 6 * parameters + 12 * layers * width * sequence_length


def correct_efficiency(rates: EfficiencyRates, estimated_s: float, measured_s: float) -> EfficiencyRates:
    """The constants after a measurement."""
    return replace(rates, factor=rates.factor * measured_s / estimated_s)


def matmul_operations(case: TrainingSetup, again: float) -> float:
    """Of a micro-batch: blocks and head; `again` is the share of the blocks that run forward twice."""
    s = case.shape
    table = s.vocabulary * s.width
    blocks = s.matmul_parameters - table
    return 2 * case.tokens * (blocks * (3 + again) + table * (4 if case.loss == "recomputed" else 3))


def attention_operations(case: TrainingSetup, again: float) -> float:
    """Of a micro-batch: two matmuls forward over half of the T x T pairs, four backward, and a fifth where the kernel
    did not keep the probabilities (Dao 2023)."""
    s, T = case.shape, case.length
    keeps = case.attention == "math" or (case.attention == "blocked" and case.length <= 1024)
    return 2 * case.tokens * s.layers * T * s.width * (1 + (2 if keeps else 2.5) + again)


def logit_bytes(case: TrainingSetup) -> float:
    """Read and written over the logits of a micro-batch, matmuls aside: plain logits pass through memory as fp32."""
    logits = case.tokens * case.shape.vocabulary
    return logits * (40 if case.loss == "plain" else 4 * case.weight_bytes)


def gradient_bytes(case: TrainingSetup) -> float:
    """Read and written to add up one micro-batch's gradients, beyond what backward itself does."""
    N, c = case.shape.parameters, case.weight_bytes
    return N * (c + 2 * case.gradient_sum_bytes) if case.once_a_step or case.stage == 0 else N * (2 * c + 24)


def update_bytes(case: TrainingSetup) -> float:
    """Read and written by one update: gradient, master and moments, the weights; torch's unfused AdamW passes more."""
    P, c = case.shape.parameters / (case.world if case.stage else 1), case.weight_bytes
    unfused = case.device == "cpu" and not (case.once_a_step and case.compiled_update)
    kind = case.optimizer_kind
    return P * (kind.traffic_bytes + case.gradient_sum_bytes + c + (kind.eager_traffic_bytes if unfused else 0))


def reduction_bytes(case: TrainingSetup) -> float:
    """Sent by one rank for a step; to scatter or gather x bytes it sends x (W - 1) / W (Patarasuk & Yuan 2009).

    Gradients travel as fp32: once a step, under ZeRO-2 after each micro-batch. Updated weights are gathered; ZeRO-3
    gathers them for each forward and backward instead.
    """
    N, c, W = case.shape.parameters, case.weight_bytes, case.world
    times = case.accumulation if case.stage >= 2 and not case.once_a_step else 1
    gathers = {0: 4, 1: c, 2: c, 3: 2 * c * case.accumulation}[case.stage]
    return N * (4 * times + gathers) * (W - 1) / W
