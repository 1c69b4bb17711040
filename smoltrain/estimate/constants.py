"""Every number of the estimate that no formula gives, in one place: its unit, and where it comes from."""

from dataclasses import dataclass, replace
from typing import Literal

MIB, GIB = 2**20, 2**30
GB, TERA = 1e9, 1e12  # as in data sheets


@dataclass(frozen=True)
class DeviceSpec:
    """What one rank has."""

    name: str
    kind: Literal["cuda", "cpu"]
    memory: float  # bytes
    half_flops: float  # operations per second of a matmul in bf16 or fp16, sums in fp32
    fp32_flops: float  # the same in torch's default of fp32, which is no TF32
    bandwidth: float  # bytes per second of its memory
    link: float  # bytes per second to the other ranks of the node, each direction
    reached_matmul: float = 0.8  # share of half_flops that the best product reaches
    reached_attention: tuple[float, float] = (0.4, 0.35)  # the same of its best attention kernel, forward and backward

    def peak_flops(self, precision: str) -> float:
        """Operations per second of a matmul in this precision, at the peak."""
        return self.fp32_flops if precision == "fp32" else self.half_flops


# The vendor's data sheets (NVIDIA H200, H100 SXM, A100 SXM, L4; GeForce RTX 4090): dense, without sparsity.
# reached_matmul: H100, H200 0.80 and A100 0.86 in Bekman's ml-engineering (its table of maximum achievable matmul
# FLOPS); of the others a guess. reached_attention: causal, T 2,048, heads 64 wide. On a Hopper 370 and 290 TFLOP/s by
# FlashAttention 3, 4 or cuDNN, by version 2 a third less; on the others by version 2. Guesses, below what the figures
# of Shah et al. 2024 and Dao 2023 show for long rows.
HOPPER_ATTENTION, AMPERE_ATTENTION = (370 / 989, 290 / 989), (0.45, 0.38)
GPUS = {
    device.name: device
    for device in (
        DeviceSpec("h200", "cuda", 141 * GB, 989 * TERA, 67 * TERA, 4800 * GB, 450 * GB, 0.80, HOPPER_ATTENTION),
        DeviceSpec("h100", "cuda", 80 * GB, 989 * TERA, 67 * TERA, 3350 * GB, 450 * GB, 0.80, HOPPER_ATTENTION),
        DeviceSpec("a100-80", "cuda", 80 * GB, 312 * TERA, 19.5 * TERA, 2039 * GB, 300 * GB, 0.86, AMPERE_ATTENTION),
        DeviceSpec("a100-40", "cuda", 40 * GB, 312 * TERA, 19.5 * TERA, 1555 * GB, 300 * GB, 0.86, AMPERE_ATTENTION),
        DeviceSpec("l4", "cuda", 24 * GB, 121 * TERA, 30.3 * TERA, 300 * GB, 32 * GB, 0.80, AMPERE_ATTENTION),
        DeviceSpec("4090", "cuda", 24 * GB, 165 * TERA, 82.6 * TERA, 1008 * GB, 32 * GB, 0.80, AMPERE_ATTENTION),
    )
}

# What CUDA calls them. A name stands for one peak: other cards of a family (PCIe, NVL, laptops, MIG slices) differ.
GPU_OF_CUDA_NAME = {
    "NVIDIA H200": "h200",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA A100-SXM4-80GB": "a100-80",
    "NVIDIA A100 80GB PCIe": "a100-80",
    "NVIDIA A100-SXM4-40GB": "a100-40",
    "NVIDIA A100-PCIE-40GB": "a100-40",
    "NVIDIA L4": "l4",
    "NVIDIA GeForce RTX 4090": "4090",
}


@dataclass(frozen=True)
class EfficiencyRates:
    """Which share of its peaks a device reaches; and what a step costs at least."""

    bandwidth: float  # of the memory's
    link: float  # of the link's within a node
    step_s: float  # of the host: reductions of counts, the optimizer's own work, logs
    newton_schulz: float  # of the matmul peak, in Muon's iterations
    network: float  # of the link's between nodes
    correction: float = 1.0  # of all seconds, from --measure

    def corrected(self, estimated_s: float, measured_s: float) -> "EfficiencyRates":
        """The rates by which the estimate would have been what was measured."""
        return replace(self, correction=self.correction * measured_s / estimated_s)


EFFICIENCY = {
    # network: headers of Ethernet, IP and TCP leave 0.94 at an MTU of 1,500; the rest of it is a guess.
    # bandwidth is 0.8 of GPU_REACHED_BANDWIDTH, a guess; so are newton_schulz and step_s.
    "cuda": EfficiencyRates(bandwidth=0.72, link=0.6, step_s=5e-3, newton_schulz=0.4, network=0.9),
    # Eight shapes of 2 to 30 blocks on two cores (docs/performance.md); newton_schulz, in fp32, of seven shapes of
    # matrices, 192 x 576 to 1024 x 2816, on one core: 0.67 to 0.78.
    "cpu": EfficiencyRates(bandwidth=0.9, link=0.4, step_s=20e-3, newton_schulz=0.75, network=0.9),
}

# How a CPU computes, from the same eight shapes.
CPU_MATMUL = 0.92  # share of the matmul peak
CPU_ATTENTION = {"blocked": 0.24, "sdpa": 0.11, "math": 0.08}  # of the matmul peak
CPU_ACTIVATION_PASSES = 4.5  # how often what a block keeps is read or written, forward and backward
CPU_BLOCK_S = 1e-3  # seconds that a block needs, forward and backward, to start its operations
CPU_EAGER_BLOCK_S = 6e-3  # the same where it is not compiled

# How a GPU computes. None was measured.
GPU_REACHED_BANDWIDTH = 0.9  # share of its memory's data sheet that a copy reaches; on an H200 4.3 of 4.8 TB/s
# A product of n x k and k x m reaches 1 / (1 + GPU_NARROW_SIDE (1/n + 1/k + 1/m)) of the best one: a guess, within a
# tenth of others that were made shape by shape for SmolLM2-135M, from 0.40 of 576 x 192 to 0.78 of 576 x 49152.
GPU_NARROW_SIDE = 200
# Seconds of the host, guesses: 4 us were measured for an operation from Python without autograd; 5 to 25 are told.
OPERATION_S = 8e-6  # an operation that is not compiled, forward with what autograd notes of it, or backward
COMPILED_KERNEL_S = 5e-6  # a kernel within a compiled region
COMPILED_REGION_S = 100e-6  # to enter one, forward or backward: its guards, autograd's part
ZERO3_MODULE_S = 200e-6  # DeepSpeed's hooks around a module with parameters, forward and backward, under ZeRO-3
# Attention by its definition, forward and backward, counted on a CPU: bytes that pass memory for a score in fp32;
# operations that the host starts.
MATH_SCORE_BYTES, MATH_OPERATIONS = (32, 28), (18, 15)
SHORTEST_KERNEL_S = 2e-6  # of the device, from one kernel to the next; a guess
# Operations of an update, counted on a CPU (docs/results/gpu-path.md): AdamW once a step, compiled or torch's fused;
# what Muon adds for each stack of matrices; DeepSpeed's, by parameter.
COMPILED_UPDATE_OPERATIONS = 22
FUSED_UPDATE_OPERATIONS = 38
MUON_STACK_OPERATIONS = 25
DEEPSPEED_UPDATE_OPERATIONS = 631 / 272  # of each parameter
DEEPSPEED_HOOK_OPERATIONS = 3  # of each parameter, in a backward pass

SUM_BYTES = 4  # of each parameter's sum of gradients: fp32
# DeepSpeed's defaults of zero_optimization, in elements.
DEFAULT_BUCKET_ELEMENTS = 500_000_000  # reduce_bucket_size
DEFAULT_PERSISTENCE_THRESHOLD = 100_000  # stage3_param_persistence_threshold
DEFAULT_REUSE_DISTANCE = 1_000_000_000  # stage3_max_reuse_distance


@dataclass(frozen=True)
class NodeSpec:
    """How devices of one kind are usually joined; each value with where it comes from, for the console."""

    ranks: int  # devices of a node
    hop_s: float  # seconds of a hop within it
    within_source: str
    between: float  # bytes per second of a node to the others, each direction
    between_hop_s: float
    between_source: str


# NCCL's src/graph/tuning.cc, Ring/Simple, seconds: baseLat, and hwLat of NVLINK, PCI and NET.
NCCL_CALL_S, NVLINK_HOP_S, PCIE_HOP_S, NET_HOP_S = 8.4e-6, 3.4e-6, 5.7e-6, 9.6e-6
GLOO_HOP_LATENCIES = 2  # gloo/transport/tcp/pair.cc; measured as 2.1 over links of 10 ms
GLOO_SEGMENT_BYTES = MIB  # gloo/allreduce.h: kMaxSegmentSize
ETHERNET_HOP_S = 50e-6  # of TCP through two kernels and a switch: a guess
GBIT = 1e9 / 8
NODES = {
    "h200": NodeSpec(8, NVLINK_HOP_S, "NVLink, its data sheet", 3200 * GBIT, NET_HOP_S, "DGX H200: 8 x 400 Gbit/s"),
    "h100": NodeSpec(8, NVLINK_HOP_S, "NVLink, its data sheet", 3200 * GBIT, NET_HOP_S, "DGX H100: 8 x 400 Gbit/s"),
    "a100-80": NodeSpec(8, NVLINK_HOP_S, "NVLink, its data sheet", 1600 * GBIT, NET_HOP_S, "DGX A100: 8 x 200 Gbit/s"),
    "a100-40": NodeSpec(8, NVLINK_HOP_S, "NVLink, its data sheet", 1600 * GBIT, NET_HOP_S, "DGX A100: 8 x 200 Gbit/s"),
    "l4": NodeSpec(8, PCIE_HOP_S, "PCIe 4.0 x16", 100 * GBIT, ETHERNET_HOP_S, "100 Gbit/s Ethernet, a guess"),
    "4090": NodeSpec(8, PCIE_HOP_S, "PCIe 4.0 x16", 25 * GBIT, ETHERNET_HOP_S, "25 Gbit/s Ethernet, a guess"),
    "cpu": NodeSpec(1, 0.0, "memory, measured", 10 * GBIT, ETHERNET_HOP_S, "10 Gbit/s Ethernet, a guess"),
}

# Failures. Grattafiori et al. 2024 (Llama 3, section 3.3.4): 419 unexpected interruptions of 2,048 nodes in 54 days.
NODE_MTBF_HOURS = 54 * 24 * 2048 / 419
CHECKPOINT_PAUSE_S = 0.2  # beside the copy: ranks that wait for each other; a guess
CHECKPOINT_COPY = 10 * GB  # bytes per second of a rank's copy into host memory; a guess (PCIe 4.0 x16 has 32 GB/s)
CHECKPOINT_WRITE = 1 * GB  # bytes per second of the folder that all ranks write to; a guess
RESTART_S = 180.0  # to notice a lost node (60 s at most), start everywhere, compile and read the checkpoint; a guess

# The rest of the memory. CUDA: measured with an empty model; the share is a guess.
CUDA_BASE_BYTES = 1000 * MIB  # context, NCCL and cuBLAS, which torch.cuda.max_memory_allocated does not see
CUDA_FRAGMENTATION = 0.03  # share of all that is allocated: blocks that do not fit where another was freed
# CPU: resident sets, fitted to nine of fourteen real runs (docs/estimate.md).
CPU_BASE_BYTES = 503 * MIB  # Python, torch, DeepSpeed and the data of a model that weighs nothing
CPU_COMPILER_BYTES = 66 * MIB  # what inductor loads to compile
CPU_FRAGMENTATION = 0.05  # share of the tensors that come and go, which malloc keeps between them
CPU_STARTING_BYTES = 6  # bytes a parameter of the fp32 model that DeepSpeed converts; freed, and used again later
CPU_BUCKET_FRAGMENTATION = 12  # bytes an element of DeepSpeed's bucket, which malloc puts on new pages each time
CPU_GATHERED_FRAGMENTATION = 6  # bytes a parameter: likewise the weights that ZeRO-3 gathers

# Tokens of a micro-batch beyond which none was faster: measured on CPUs (docs/performance.md), on GPUs a guess.
BUSY_TOKENS = {"cpu": 2048, "cuda": 32768}
SPARE_SHARE = 0.05  # of a device's memory, left free for what the estimate does not know
