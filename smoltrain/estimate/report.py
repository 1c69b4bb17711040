"""What the estimate says to its reader: tables, and advice in words."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from rich.box import SIMPLE_HEAD
from rich.table import Table

from smoltrain.config.schema import Config
from smoltrain.engine.optimizer import checkpoint_bytes
from smoltrain.estimate.case import TrainingSetup
from smoltrain.estimate.devices import DeviceSpec
from smoltrain.estimate.fitting import SPARE_SHARE, list_recompute_modes
from smoltrain.estimate.memory import GIB, PARTS, MemoryEstimate, estimate_memory
from smoltrain.estimate.speed import EfficiencyRates, SpeedEstimate, estimate_speed
from smoltrain.schedule import Plan

PART_LABELS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "masters and moments",
    "activations": "activations",
    "logits": "logits, head's gradients",
    "reduction": "reduction buffers",
    "update": "the update's temporaries",
    "checkpoint": "a checkpoint in the making",
    "rest": "the rest",
}
STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Estimate:
    """An estimate whole: one case on one device."""

    case: TrainingSetup
    device: DeviceSpec
    memory: MemoryEstimate
    speed: SpeedEstimate

    @property
    def fits(self) -> bool:
        """Whether it fits one rank's memory, with some to spare."""
        return self.memory.total <= self.device.memory * (1 - SPARE_SHARE)


def build_estimate(
    case: TrainingSetup, device: DeviceSpec, rates: EfficiencyRates | None = None, base: float | None = None
) -> Estimate:
    """Memory and speed of a case; `rates` and `base` correct them."""
    return Estimate(case, device, estimate_memory(case, base), estimate_speed(case, device, rates))


def build_parts_table(one: Estimate) -> Table:
    """Memory and time of the case as it stands."""
    table = _make_table("memory of a rank", "GiB", "time of a step", "s")
    sizes = [(PART_LABELS[part], f"{one.memory[part] / GIB:.2f}") for part in PARTS if one.memory[part] > 0]
    sizes.append(("in all", f"{one.memory.total / GIB:.2f}"))
    times = [(name, f"{seconds:.3f}") for name, seconds in one.speed.parts.items() if seconds > 0]
    times.append(("in all", f"{one.speed.step_s:.3f}"))
    for i in range(max(len(sizes), len(times))):
        row = (*(sizes[i] if i < len(sizes) else ("", "")), *(times[i] if i < len(times) else ("", "")))
        table.add_row(*row)
    return table


def estimate_alternatives(
    one: Estimate, config: Config, rates: EfficiencyRates | None, base: float | None
) -> dict[tuple, Estimate]:
    """The same training under each ZeRO stage and way of gradient checkpointing, by (stage, mode).

    ZeRO-0 in bf16 is left out: DeepSpeed computes it with another optimizer, and engine.py refuses it.
    """
    found, asked = {}, config.engine.reduce_gradients
    for stage in STAGES:
        if stage == 0 and one.case.precision == "bf16":
            continue
        at_stage = one.case.with_zero_stage(stage, asked)
        for mode in list_recompute_modes(config, one.case):
            found[stage, mode] = build_estimate(replace(at_stage, recompute=mode), one.device, rates, base)
    return found


def build_alternatives_table(rows: dict[tuple, Estimate], asked: TrainingSetup) -> Table:
    """Each alternative in a line; a star is the recipe's own."""
    table = _make_table("ZeRO", "checkpointing", "GiB", "fits", "step s", "tokens/s", "MFU")
    for (stage, mode), row in rows.items():
        own = "*" if (stage, mode) == (asked.stage, asked.recompute) else ""
        how = f"every {mode}." if isinstance(mode, int) else mode
        table.add_row(
            f"{stage}{own}", how, f"{row.memory.total / GIB:.2f}", "yes" if row.fits else "no",
            f"{row.speed.step_s:.3f}", f"{row.speed.tokens_per_s:,.0f}", f"{row.speed.mfu:.1%}",
        )  # fmt: skip
    return table


def plan_summary(one: Estimate, config: Config) -> str:
    """Hours and disk of the whole plan."""
    plan = Plan(config.phases)
    hours = plan.last_step * one.speed.step_s / 3600
    tokens = plan.last_step * one.case.tokens_per_step
    count, size = max_num_checkpoints(plan, config), estimated_checkpoint_bytes(one.case)
    return (
        f"{plan.last_step:,} steps, {tokens / 1e9:,.2f} billion tokens: {hours:,.1f} hours without evaluation and "
        f"sampling; on disk at most {count} checkpoints of {size / GIB:.2f} GiB, {count * size / GIB:.1f} GiB"
    )


def estimated_checkpoint_bytes(case: TrainingSetup) -> float:
    """About what one checkpoint takes on disk."""
    return checkpoint_bytes(case.optimizer_kind, case.shape.parameters, case.weight_bytes)


def max_num_checkpoints(plan: Plan, config: Config) -> int:
    """How many there are at the fullest: those that are kept, and the one that is written before another goes."""
    keep, every, last = config.checkpoint, config.checkpoint.every, plan.last_step
    ends = {phase.last for phase in plan.phases}
    due = ends | (set(range(every, last + 1, every)) if every else set())
    kept = set(sorted(due)[-keep.keep_last :]) | ends
    kept |= {step for step in due if keep.keep_every and step % keep.keep_every == 0}
    return min(len(due), len(kept) + keep.keep_best + 1)


def write_advice(one: Estimate, rows: dict[tuple, Estimate]) -> Iterator[str]:
    """What the numbers say should be chosen, a sentence each."""
    asked = one.case
    if not one.fits:
        yield f"does not fit {one.device.name} ({one.device.memory / GIB:.0f} GiB a rank)"
    fitting = {key: row for key, row in rows.items() if row.fits}
    if not fitting:
        yield "nothing in the table fits: take a smaller batch.micro_batch, or more devices"
        return
    same = [mode for stage, mode in fitting if stage == asked.stage]
    if same and same[0] != asked.recompute:
        saved = 1 - fitting[asked.stage, same[0]].speed.step_s / one.speed.step_s
        gain = f", {saved:.0%} less time" if one.fits else ""
        yield f"the least recomputation that fits ZeRO-{asked.stage}: engine.gradient_checkpointing={same[0]}{gain}"
    fastest = min(fitting, key=lambda key: (round(fitting[key].speed.step_s, 4), fitting[key].memory.total))
    yield from _compare_zero_stages(fitting, asked)
    row = fitting[fastest]
    yield (
        f"the fastest that fits: ZeRO-{fastest[0]}, gradient checkpointing {fastest[1]}: "
        f"{row.speed.tokens_per_s:,.0f} tokens/s in {row.memory.total / GIB:.1f} GiB a rank"
    )


def _compare_zero_stages(fitting: dict[tuple, Estimate], asked: TrainingSetup) -> Iterator[str]:
    """What ZeRO-2 costs against the lower stages, and what it saves."""
    for lower in (0, 1):
        mode = next((mode for stage, mode in fitting if stage == lower), None)
        if mode is None or (2, mode) not in fitting:
            continue
        less, more = fitting[lower, mode], fitting[2, mode]
        cost, saves = more.speed.step_s / less.speed.step_s - 1, (less.memory.total - more.memory.total) / GIB
        slower = f"{abs(cost):.1%} {'slower' if cost >= 0 else 'faster'}"
        which = "less" if saves >= 0 else "more"
        yield (
            f"ZeRO-2 is {slower} than ZeRO-{lower} and takes {abs(saves):.2f} GiB a rank {which}"
            + ("; a model of this size fits either way, so take the faster" if more.fits and less.fits else "")
        )
    if asked.stage == 3 and any(stage < 3 for stage, _ in fitting):
        yield "ZeRO-3 sends the weights for every micro-batch: it is for models that no lower stage fits"


def _make_table(*heads: str) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for i, head in enumerate(heads):
        table.add_column(
            head,
            justify="left"
            if i == 0 or not head.strip() or head in ("fits", "checkpointing", "time of a step")
            else "right",
        )
    return table
