"""What the engine sends in a step: its collectives, as the code of smoltrain and of DeepSpeed 0.19.8 calls them.

DeepSpeed's own ways of reducing send more than their papers say: ZeRO-1 and 2 all-reduce each bucket and keep a part of
it (stage_1_and_2.py: allreduce_and_scatter; bf16_optimizer.py with engine.py: buffered_allreduce_fallback), so that a
gradient costs twice a reduce-scatter. torch's gloo has no reduce-scatter: it all-reduces, and copies what is wanted.

Legend: N parameters, W ranks, A micro-batches of a rank and step, c bytes of a weight.
"""

from dataclasses import dataclass

from smoltrain.distributed.communication import CollectiveKind, choose_reduce_scatter
from smoltrain.engine.reduction import gradient_dtypes
from smoltrain.estimate.collectives import Network, all_reduce_seconds, ring_seconds
from smoltrain.estimate.constants import DEFAULT_PERSISTENCE_THRESHOLD, DEFAULT_REUSE_DISTANCE, SUM_BYTES
from smoltrain.estimate.training_setup import TrainingSetup
from smoltrain.kernels.precision import DTYPES

STEP_NUMBERS_BYTES = 64  # losses, counts and flags of a step (training/step.py, training/taken_rows.py): latency is all


@dataclass(frozen=True)
class Collective:
    """Calls of one kind in a step."""

    what: str
    kind: CollectiveKind
    num_bytes: float  # of the whole tensor, in one repetition
    repetitions: int  # a step
    calls: int = 1  # among which a repetition's bytes are split
    is_of_hosts: bool = False  # through the group of the hosts, gloo

    def seconds(self, world: int, network: Network) -> float:
        """Of all calls of a step."""
        bytes_per_call = self.num_bytes / self.calls
        if self.kind == "all-reduce":
            call_s = all_reduce_seconds(bytes_per_call, world, network)
        else:
            call_s = ring_seconds(bytes_per_call, world, network)
        return self.repetitions * self.calls * call_s


def list_collectives(setup: TrainingSetup, *, shared_memory: bool = False) -> list[Collective]:
    """Those of a step; `shared_memory`: the ranks of a CPU read each other's tensors (engine/shared_tensor.py)."""
    N, A = setup.shape.parameters, setup.accumulation
    buckets = max(1, -(-N // setup.bucket))
    scatter = choose_reduce_scatter(setup.device)
    groups = _list_parameter_groups(setup)
    weights = [Collective("weights", "all-gather", size * setup.weight_bytes, 1) for size in groups]
    if setup.once_per_step:
        kind = "reduce-scatter" if shared_memory else scatter
        gradients = [Collective("gradients", kind, size * setup.gradient_sum_bytes, 1) for size in groups]
        return [*gradients, *weights]
    reduced = N * DTYPES[gradient_dtypes(setup.ds_config).reduction].itemsize
    if setup.stage == 0:
        return [Collective("gradients", "all-reduce", reduced, 1, buckets)]
    if setup.stage < 3:
        repetitions = A if setup.stage == 2 else 1
        gradients = [Collective("gradients", "all-reduce", reduced, repetitions, buckets)]
        if setup.stage == 2 or setup.precision != "bf16":  # DeepSpeedZeroOptimizer: get_grad_norm_direct of each group
            gradients.append(Collective("norms", "all-reduce", SUM_BYTES * len(groups), 1, len(groups)))
        return [*gradients, *weights]
    return [Collective("gradients", scatter, reduced, A, buckets), *_list_zero3_gathers(setup)]


def _list_parameter_groups(setup: TrainingSetup) -> list[int]:
    """Elements of the optimizer's groups, each of which is exchanged by itself: matrices, and vectors, which do not
    decay (engine/optimizer.py); Muon's tables have another learning rate than its hidden matrices."""
    shape = setup.shape
    tables = shape.vocabulary * shape.width * (1 if shape.tied else 2)
    vectors = shape.parameters - shape.hidden_parameters - tables
    sizes = [shape.hidden_parameters + tables, vectors]
    if setup.newton_schulz_steps:
        sizes = [shape.hidden_parameters, tables, vectors]
    return [size for size in sizes if size > 0]


def _list_zero3_gathers(setup: TrainingSetup) -> list[Collective]:
    """Weights that ZeRO-3 gathers: for each forward, and again for backward where they were released meanwhile.

    A weight is kept that is used again within stage3_max_reuse_distance elements of others, of a smaller model every
    one (partitioned_param_coordinator.py: __params_to_release). Small tensors stay on every rank, and are gathered
    after an update. A call for each matrix: DeepSpeed joins some of them, so that there are fewer.
    """
    zero = setup.ds_config.get("zero_optimization", {})
    threshold = int(zero.get("stage3_param_persistence_threshold", DEFAULT_PERSISTENCE_THRESHOLD))
    reuse = int(zero.get("stage3_max_reuse_distance", DEFAULT_REUSE_DISTANCE))
    shape = setup.shape
    sizes = [rows * columns for rows, columns in shape.hidden_matrices]
    sizes.extend([shape.vocabulary * shape.width] * (1 if shape.tied else 2))
    parted = [size for size in sizes if size > threshold]
    kept = max(0, shape.parameters - sum(parted))
    released = max(0.0, 1 - reuse / (2 * shape.parameters))  # a step passes 2N of them
    gathered = sum(parted) * setup.weight_bytes * (1 + released)
    return [
        Collective("weights", "all-gather", gathered, setup.accumulation, max(1, len(parted))),
        Collective("small weights", "all-gather", kept * setup.weight_bytes, 1),
    ]


def list_number_exchanges() -> list[Collective]:
    """What the ranks tell each other of a step: one all-gather where they compute, and a sum on their hosts."""
    return [
        Collective("numbers", "all-gather", STEP_NUMBERS_BYTES, 1),
        Collective("host numbers", "all-reduce", STEP_NUMBERS_BYTES, 1, is_of_hosts=True),
    ]


def overlapped_seconds(setup: TrainingSetup, reducing_s: float, backward_s: float) -> float:
    """Of `reducing_s`, those that pass while backward computes (`backward_s`), both of a step.

    None but where DeepSpeed reduces and a config of one's own has overlap_comm: smoltrain's configs have it off, and
    OncePerStep begins when the last backward has ended. A bucket is sent when it is full; the last one of a micro-batch
    has no backward left to hide behind.
    """
    zero = setup.ds_config.get("zero_optimization", {})
    if setup.once_per_step or setup.stage < 2 or not zero.get("overlap_comm", setup.stage == 3):
        return 0.0
    buckets = max(1, -(-setup.shape.parameters // setup.bucket))
    return min(reducing_s, backward_s) * (buckets - 1) / buckets
