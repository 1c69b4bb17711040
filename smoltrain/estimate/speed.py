"""Seconds of a step, by part: what there is to compute and to move, over what a device does of it per second.

A GPU's micro-batch is that of roofline.py. Its host starts the kernels while it computes, and reads the numbers of a
step during the next one, so that a step takes as long as the slower of the two.

A matmul of n tokens with p parameters takes 2np operations forward and 4np backward (Kaplan et al. 2020, section 2.1).
What is recomputed comes on top, but is not counted in MFU = tokens/s x (6N + 12 L D T) / peak (Chowdhery et al. 2022,
appendix B), so that MFU is comparable.

Legend: as memory.py, L blocks. `recomputed` is the share of the blocks that run forward twice.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from smoltrain.config.schema import Config
from smoltrain.estimate.collectives import Network, exchange_seconds
from smoltrain.estimate.constants import (
    CPU_ACTIVATION_PASSES,
    CPU_ATTENTION,
    CPU_BLOCK_S,
    CPU_EAGER_BLOCK_S,
    CPU_MATMUL,
    EFFICIENCY,
    GPU_REACHED_BANDWIDTH,
    DeviceSpec,
    EfficiencyRates,
)
from smoltrain.estimate.memory import block_activation_bytes, keeps_probabilities, num_recomputed_blocks
from smoltrain.estimate.network import build_network, host_network
from smoltrain.estimate.orthogonalization import (
    iteration_dtype,
    orthogonalization_operations,
    orthogonalization_sent_bytes,
    orthogonalization_traffic_bytes,
)
from smoltrain.estimate.roofline import WAITING, HostTime, KernelWork, estimate_host_time, list_work
from smoltrain.estimate.traffic import list_collectives, list_number_exchanges, overlapped_seconds
from smoltrain.estimate.training_setup import TrainingSetup, model_shape
from smoltrain.model.flops import flops_per_token

MATRIX_EXCHANGES = 2  # all-to-alls of an update: matrices to their owners, and back (engine/matrix_exchange.py)


@dataclass(frozen=True)
class SpeedEstimate:
    """Seconds of a step by part, and what follows for all ranks together."""

    parts: Mapping[str, float]
    tokens_per_s: float
    mfu: float
    limits: Mapping[str, float] = field(default_factory=dict)  # of the parts, at a GPU's limits and without its host
    host: HostTime | None = None  # of a GPU

    @property
    def step_s(self) -> float:
        """Seconds of one optimizer step."""
        return sum(self.parts.values())


def estimate_speed(
    setup: TrainingSetup, device: DeviceSpec, rates: EfficiencyRates | None = None, network: Network | None = None
) -> SpeedEstimate:
    """The estimate on this device, by its usual rates and nodes or by others."""
    rates = rates or EFFICIENCY[device.kind]
    network = network or build_network(device, rates, setup.world)
    host: HostTime | None = None
    limits: dict[str, float] = {}
    if setup.device == "cuda":
        work = list_work(setup, device)
        seconds = _gpu_seconds(setup, work, device, rates, network)
        at_best = replace(rates, bandwidth=GPU_REACHED_BANDWIDTH, newton_schulz=device.reached_matmul)
        limits = _gpu_seconds(setup, work, device, at_best, network, at_limits=True)
        host = estimate_host_time(setup, work, own_s=rates.step_s)
        seconds[WAITING] = max(0.0, host.seconds - sum(seconds.values()))
        host = replace(host, seconds=rates.correction * host.seconds)
    else:
        seconds = _cpu_seconds(setup, device, rates, network)
    parts = {part: rates.correction * took for part, took in seconds.items()}
    tokens_per_s = setup.step_tokens / sum(parts.values())
    mfu = model_flops_utilization(setup, tokens_per_s, device.peak_flops(setup.precision))
    return SpeedEstimate(parts, tokens_per_s, mfu, limits, host)


def _gpu_seconds(
    setup: TrainingSetup, work: list[KernelWork], device: DeviceSpec, rates: EfficiencyRates, network: Network, *,
    at_limits: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Of the device, by part: what it is expected to take, or what it takes at its limits."""
    flops = device.peak_flops(setup.precision) * device.reached_matmul
    bandwidth = device.bandwidth * rates.bandwidth
    parts: dict[str, float] = {}
    for one in work:
        took_s = setup.accumulation * one.seconds(flops, bandwidth, at_limits=at_limits)
        parts[one.part] = parts.get(one.part, 0.0) + took_s
    reduction_s = communication_seconds(setup, network, backward_s=sum(parts.values()) * 2 / 3)
    return {**parts, **_seconds_of_update(setup, device, rates, network), "reduction": reduction_s}


def _cpu_seconds(
    setup: TrainingSetup, device: DeviceSpec, rates: EfficiencyRates, network: Network
) -> dict[str, float]:
    """By part; a CPU is its own host."""
    layers = setup.shape.layers
    peak = device.peak_flops(setup.precision)
    bandwidth = device.bandwidth * rates.bandwidth
    recomputed = num_recomputed_blocks(setup) / layers
    recomputed_matmuls = 0 if setup.recompute == "selective" else recomputed
    attention_rate = CPU_ATTENTION.get(setup.attention, min(CPU_ATTENTION.values()))
    launch_s = CPU_BLOCK_S if setup.compiled_blocks else CPU_EAGER_BLOCK_S
    passes = CPU_ACTIVATION_PASSES * (1 + recomputed / 3)
    activations = passes * setup.micro_batch_tokens * block_activation_bytes(setup) * layers

    matmuls = matmul_operations(setup, recomputed_matmuls) / (peak * CPU_MATMUL)
    attention = attention_operations(setup, recomputed_matmuls) / (peak * attention_rate)
    elementwise = activations / bandwidth + logit_bytes(setup) / bandwidth
    launches = launch_s * layers * (1 + recomputed / 3)
    computing = matmuls + attention + elementwise + launches
    return {
        "matmuls": setup.accumulation * matmuls,
        "attention": setup.accumulation * attention,
        "elementwise": setup.accumulation * elementwise,
        "launches": setup.accumulation * launches,
        **_seconds_of_update(setup, device, rates, network),
        "reduction": communication_seconds(setup, network, backward_s=setup.accumulation * computing * 2 / 3),
        "host": rates.step_s,
    }


def _seconds_of_update(
    setup: TrainingSetup, device: DeviceSpec, rates: EfficiencyRates, network: Network
) -> dict[str, float]:
    """Of the sums of gradients and of what is done with them."""
    bandwidth = device.bandwidth * rates.bandwidth
    return {
        "gradients": setup.accumulation * gradient_bytes(setup) / bandwidth,
        "update": update_bytes(setup) / bandwidth,
        "orthogonalisation": orthogonalization_seconds(setup, device, rates, network),
    }


def communication_seconds(setup: TrainingSetup, network: Network, backward_s: float) -> float:
    """For what the ranks send each other in a step, where a step waits for it; `backward_s` is what a step computes
    backward. Muon's matrices aside, which count as orthogonalisation."""
    shared_memory = setup.device == "cpu" and network.num_nodes(setup.world) == 1
    hosts = host_network(network)
    waiting_s = 0.0
    for collective in list_collectives(setup, shared_memory=shared_memory):
        took_s = collective.seconds(setup.world, network)
        if collective.what == "gradients":
            took_s -= overlapped_seconds(setup, took_s, backward_s)
        waiting_s += took_s
    for collective in list_number_exchanges():
        waiting_s += collective.seconds(setup.world, hosts if collective.is_of_hosts else network)
    return waiting_s


def orthogonalization_seconds(
    setup: TrainingSetup, device: DeviceSpec, rates: EfficiencyRates, network: Network
) -> float:
    """Of Muon's Newton-Schulz iterations in one update, and of what they move."""
    dtype = iteration_dtype(setup)
    peak = device.fp32_flops if dtype == torch.float32 else device.half_flops
    computing = orthogonalization_operations(setup) / (peak * rates.newton_schulz)
    moving = orthogonalization_traffic_bytes(setup) / (device.bandwidth * rates.bandwidth)
    sent = orthogonalization_sent_bytes(setup)
    return computing + moving + exchange_seconds(sent, setup.world, network, MATRIX_EXCHANGES)


def model_flops_utilization(setup: TrainingSetup, tokens_per_s: float, peak: float) -> float:
    """Share of the peak (of one rank, operations per second) that the model's own operations take."""
    s = setup.shape
    return tokens_per_s * flops_per_token(s.parameters, s.layers, s.width, setup.length) / (peak * setup.world)


def recipe_flops_per_token(config: Config) -> float:
    """Of forward and backward of a recipe's model, per target."""
    shape = model_shape(config.model)
    return flops_per_token(shape.parameters, shape.layers, shape.width, config.batch.sequence_length)


def matmul_operations(setup: TrainingSetup, recomputed: float) -> float:
    """Of a micro-batch: blocks and head."""
    table = setup.shape.vocabulary * setup.shape.width
    blocks = setup.shape.matmul_parameters - table
    head_passes = 4 if setup.loss == "recomputed" else 3
    return 2 * setup.micro_batch_tokens * (blocks * (3 + recomputed) + table * head_passes)


def attention_operations(setup: TrainingSetup, recomputed: float) -> float:
    """Of a micro-batch: two matmuls forward over half of the T x T pairs, four backward, and a fifth where the kernel
    did not keep the probabilities (Dao 2023)."""
    backward = 2 if keeps_probabilities(setup) else 2.5
    pairs = setup.shape.layers * setup.length * setup.shape.width
    return 2 * setup.micro_batch_tokens * pairs * (1 + backward + recomputed)


def logit_bytes(setup: TrainingSetup) -> float:
    """Read and written over the logits of a micro-batch, matmuls aside: plain logits pass through memory as fp32."""
    logits = setup.micro_batch_tokens * setup.shape.vocabulary
    return logits * (40 if setup.loss == "plain" else 4 * setup.weight_bytes)


def gradient_bytes(setup: TrainingSetup) -> float:
    """Read and written to add up one micro-batch's gradients, beyond what backward itself does."""
    N, c = setup.shape.parameters, setup.weight_bytes
    if setup.once_per_step or setup.stage == 0:
        return N * (c + 2 * setup.gradient_sum_bytes)
    return N * (2 * c + 24)


def update_bytes(setup: TrainingSetup) -> float:
    """Read and written by one update: gradient, master and state, the weights; torch's unfused step passes more."""
    sharing = setup.world if setup.stage else 1
    updated = setup.shape.parameters / sharing
    unfused = setup.device == "cpu" and not (setup.once_per_step and setup.compiled_update)
    kind = setup.optimizer
    hidden = setup.shape.hidden_parameters
    one_pass = kind.traffic_bytes(hidden, setup.shape.parameters - hidden) / sharing
    elementwise = setup.shape.parameters - hidden if setup.newton_schulz_steps else setup.shape.parameters
    more_passes = kind.eager_traffic_bytes * elementwise / sharing if unfused else 0
    return one_pass + more_passes + updated * (setup.gradient_sum_bytes + setup.weight_bytes)
