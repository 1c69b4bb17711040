"""What the estimate says to its reader: tables, and advice in words."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest

from rich.box import SIMPLE_HEAD
from rich.console import JustifyMethod
from rich.table import Table

from smoltrain.config.schema import Config
from smoltrain.engine.optimizer import checkpoint_bytes
from smoltrain.estimate.collectives import Network
from smoltrain.estimate.constants import GIB, SPARE_SHARE, TERA, DeviceSpec, EfficiencyRates
from smoltrain.estimate.fitting import list_recompute_modes, settle_reduction
from smoltrain.estimate.horizon import count_epoch_tokens, format_count, format_hours, read_index
from smoltrain.estimate.memory import PART_LABELS, MemoryEstimate, estimate_memory
from smoltrain.estimate.roofline import WAITING
from smoltrain.estimate.speed import SpeedEstimate, estimate_speed, model_flops_utilization
from smoltrain.estimate.training_setup import Recompute, TrainingSetup
from smoltrain.schedule import Plan

ZERO_STAGES = (0, 1, 2, 3)
SAME_TIME = 0.0005  # of a step: a difference that would be printed as 0.0 %
SAME_GIB = 0.005


@dataclass(frozen=True)
class Estimate:
    """Memory and speed of one setup on one device; `rates` and `base_bytes` are None unless a run was measured."""

    setup: TrainingSetup
    device: DeviceSpec
    rates: EfficiencyRates | None = None
    base_bytes: float | None = None
    network: Network | None = None  # None: the device's usual nodes

    @property
    def memory(self) -> MemoryEstimate:
        """Bytes of one rank, by part."""
        return estimate_memory(self.setup, self.base_bytes)

    @property
    def speed(self) -> SpeedEstimate:
        """Seconds of a step, by part."""
        return estimate_speed(self.setup, self.device, self.rates, self.network)

    @property
    def fits(self) -> bool:
        """Whether it fits one rank's memory, with some to spare."""
        return self.memory.total <= self.device.memory * (1 - SPARE_SHARE)


Alternatives = Mapping[tuple[int, Recompute], Estimate]  # by ZeRO stage and gradient checkpointing


def estimate_alternatives(estimate: Estimate, config: Config) -> Alternatives:
    """The same training under each ZeRO stage and way of gradient checkpointing.

    ZeRO-0 in bf16 is left out: DeepSpeed computes it with another optimizer, and a run refuses it.
    """
    alternatives: dict[tuple[int, Recompute], Estimate] = {}
    for stage in ZERO_STAGES:
        if stage == 0 and estimate.setup.precision == "bf16":
            continue
        at_stage = estimate.setup.with_zero_stage(stage)
        for mode in list_recompute_modes(config, estimate.setup):
            setup = settle_reduction(replace(at_stage, recompute=mode), estimate.device.memory)
            alternatives[stage, mode] = replace(estimate, setup=setup)
    return alternatives


def setup_summary(estimate: Estimate, config: Config) -> str:
    """What is estimated, in a line."""
    setup = estimate.setup
    rows = setup.step_tokens // setup.length
    return (
        f"{config.run.name}: {setup.shape.parameters:,} parameters on {setup.world} x {estimate.device.name}, "
        f"ZeRO-{setup.stage}, {setup.precision}, {rows:,} rows a step, "
        f"{setup.micro_batch} x {setup.accumulation} of them a rank, T {setup.length}, "
        f"attention {setup.attention}, loss {setup.loss}"
    )


def plan_summary(estimate: Estimate, config: Config) -> str:
    """Time and disk of the whole plan."""
    plan = Plan(config.phases)
    duration = format_hours(plan.last_step * estimate.speed.step_s / 3600)
    setup = estimate.setup
    tokens = plan.last_step * setup.step_tokens
    index = read_index(config.run_folder)
    epoch_tokens = None if index is None else count_epoch_tokens(index, setup.length)
    epochs = "" if epoch_tokens is None else f", {tokens / epoch_tokens:.3g} epochs"
    count = max_num_checkpoints(plan, config)
    hidden = setup.shape.hidden_parameters
    size = checkpoint_bytes(setup.optimizer, hidden, setup.shape.parameters - hidden, setup.weight_bytes)
    return (
        f"{plan.last_step:,} steps, {format_count(tokens)} tokens{epochs}: {duration} without evaluation and "
        f"sampling; on disk at most {count} checkpoints of {size / GIB:.2f} GiB, {count * size / GIB:.1f} GiB"
    )


def max_num_checkpoints(plan: Plan, config: Config) -> int:
    """How many there are at the fullest: those that are kept, and the one that is written before another goes."""
    keep, every, last = config.checkpoint, config.checkpoint.every, plan.last_step
    ends = {phase.last for phase in plan.phases}
    due = ends | (set(range(every, last + 1, every)) if every else set())
    kept = set(sorted(due)[-keep.keep_last :]) | ends
    kept |= {step for step in due if keep.keep_every and step % keep.keep_every == 0}
    return min(len(due), len(kept) + keep.keep_best + 1)


def build_parts_table(estimate: Estimate) -> Table:
    """Memory and time of the setup as it stands, by part."""
    memory, speed = estimate.memory, estimate.speed
    sizes = [(label, f"{memory[part] / GIB:.2f}") for part, label in PART_LABELS.items() if memory[part] > 0]
    sizes.append(("in all", f"{memory.total / GIB:.2f}"))
    columns: dict[str, JustifyMethod] = {"memory of a rank": "left", "GiB": "right", "time of a step": "left"}
    times: list[tuple[str, ...]] = []
    for part, seconds in [*speed.parts.items(), ("in all", speed.step_s)]:
        limit_s = sum(speed.limits.values()) if part == "in all" else speed.limits.get(part, 0.0)
        if seconds > 0:  # of a GPU in ms
            times.append(
                (part, f"{1000 * seconds:.2f}", f"{1000 * limit_s:.2f}") if speed.limits else (part, f"{seconds:.3f}")
            )
    columns |= {"ms": "right", "at its limits": "right"} if speed.limits else {"s": "right"}
    table = make_table(columns)
    for size, took in zip_longest(sizes, times, fillvalue=("", "")):
        table.add_row(*size, *took)
    return table


def speed_summary(estimate: Estimate) -> Iterator[str]:
    """What a GPU does against its limits and its data sheet, and who waits for whom; nothing of a CPU."""
    setup, device, speed = estimate.setup, estimate.device, estimate.speed
    if speed.host is None:
        return
    peak = device.peak_flops(setup.precision)
    at_limits = setup.step_tokens / sum(speed.limits.values())
    mfu_at_limits = model_flops_utilization(setup, at_limits, peak)
    yield (
        f"{device.name}, of which none was measured: {speed.tokens_per_s / setup.world:,.0f} tokens/s a rank are "
        f"expected, {speed.mfu:.1%} MFU of its data sheet's {peak / TERA:g} TFLOP/s; "
        f"at its limits {at_limits / setup.world:,.0f}, {mfu_at_limits:.1%}"
    )
    waiting_s = speed.parts[WAITING]
    waits = "the step waits for it: take a larger batch.micro_batch" if waiting_s else "the step does not wait for it"
    yield (
        f"a step computes {1000 * (speed.step_s - waiting_s):.2f} ms; its host starts {speed.host.launches:,.0f} "
        f"operations in {1000 * speed.host.seconds:.2f} ms: {waits}"
    )


def build_alternatives_table(alternatives: Alternatives, setup: TrainingSetup) -> Table:
    """Each alternative in a line; a star is the recipe's own."""
    numbers: dict[str, JustifyMethod] = {"step s": "right", "tokens/s": "right", "MFU": "right"}
    table = make_table({"ZeRO": "left", "checkpointing": "left", "GiB": "right", "fits": "left", **numbers})
    for (stage, mode), estimate in alternatives.items():
        star = "*" if (stage, mode) == (setup.stage, setup.recompute) else ""
        speed = estimate.speed
        table.add_row(
            f"{stage}{star}", f"every {mode}." if isinstance(mode, int) else mode,
            f"{estimate.memory.total / GIB:.2f}", "yes" if estimate.fits else "no",
            f"{speed.step_s:.3f}", f"{speed.tokens_per_s:,.0f}", f"{speed.mfu:.1%}",
        )  # fmt: skip
    return table


def write_advice(estimate: Estimate, alternatives: Alternatives) -> Iterator[str]:
    """What the numbers say should be chosen, a sentence each."""
    setup, device = estimate.setup, estimate.device
    if not estimate.fits:
        yield f"does not fit {device.name} ({device.memory / GIB:.0f} GiB a rank)"
    fitting = {key: one for key, one in alternatives.items() if one.fits}
    if not fitting:
        yield "nothing in the table fits: take a smaller batch.micro_batch, or more devices"
        return
    least = _least_recomputation(fitting, setup.stage)
    if least is not None and least != setup.recompute:
        saved = 1 - fitting[setup.stage, least].speed.step_s / estimate.speed.step_s
        gain = f", {saved:.0%} less time" if estimate.fits else ""
        yield f"the least recomputation that fits ZeRO-{setup.stage}: engine.gradient_checkpointing={least}{gain}"
    yield from _compare_zero_stages(fitting)
    if setup.stage == 3 and any(stage < 3 for stage, _ in fitting):
        yield "ZeRO-3 sends the weights for every micro-batch: it is for models that no lower stage fits"
    stage, mode = min(fitting, key=lambda key: (round(fitting[key].speed.step_s, 4), fitting[key].memory.total))
    fastest = fitting[stage, mode]
    yield (
        f"the fastest that fits: ZeRO-{stage}, gradient checkpointing {mode}: "
        f"{fastest.speed.tokens_per_s:,.0f} tokens/s in {fastest.memory.total / GIB:.1f} GiB a rank"
    )


def _compare_zero_stages(fitting: Alternatives) -> Iterator[str]:
    """What ZeRO-2 costs against the lower stages, and what it saves."""
    for stage in (0, 1):
        mode = _least_recomputation(fitting, stage)
        if mode is None or (2, mode) not in fitting:
            continue
        lower, zero2 = fitting[stage, mode], fitting[2, mode]
        cost = zero2.speed.step_s / lower.speed.step_s - 1
        saved = (lower.memory.total - zero2.memory.total) / GIB
        speed = f"{abs(cost):.1%} {'slower' if cost > 0 else 'faster'} than"
        if abs(cost) < SAME_TIME:
            speed = "as fast as"
        memory = f"{abs(saved):.2f} GiB a rank {'less' if saved > 0 else 'more'}"
        if abs(saved) < SAME_GIB:
            memory = "as much memory"
        yield f"ZeRO-2 is {speed} ZeRO-{stage} and takes {memory}; a model of this size fits either way"


def _least_recomputation(fitting: Alternatives, stage: int) -> Recompute | None:
    """Of the ways that fit this stage, the one that computes least again."""
    return next((mode for at_stage, mode in fitting if at_stage == stage), None)


def make_table(columns: Mapping[str, JustifyMethod]) -> Table:
    """A table without rows, plain enough for a log: heads, and a line below them."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for head, justify in columns.items():
        table.add_column(head, justify=justify)
    return table
