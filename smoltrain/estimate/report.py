"""What the estimate says to its reader: tables, and advice in words."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from rich.box import SIMPLE_HEAD
from rich.table import Table

from smoltrain.estimate import fitting
from smoltrain.estimate.case import Case
from smoltrain.estimate.devices import Device
from smoltrain.estimate.memory import GIB, MASTER, MOMENTS, PARTS, Memory, memory
from smoltrain.estimate.speed import Rates, Speed, speed
from smoltrain.plan import Plan
from smoltrain.schema import Config

WORDS = {
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
class Outlook:
    """An estimate whole: one case on one device."""

    case: Case
    device: Device
    memory: Memory
    speed: Speed

    @property
    def fits(self) -> bool:
        """Whether it fits one rank's memory, with some to spare."""
        return self.memory.total <= self.device.memory * (1 - fitting.SPARE)


def outlook(case: Case, device: Device, rates: Rates | None = None, base: float | None = None) -> Outlook:
    """Memory and speed of a case; `rates` and `base` correct them."""
    return Outlook(case, device, memory(case, base), speed(case, device, rates))


def by_part(one: Outlook) -> Table:
    """Memory and time of the case as it stands."""
    table = _table("memory of a rank", "GiB", "time of a step", "s")
    sizes = [(WORDS[part], f"{one.memory[part] / GIB:.2f}") for part in PARTS if one.memory[part] > 0]
    sizes.append(("in all", f"{one.memory.total / GIB:.2f}"))
    times = [(name, f"{seconds:.3f}") for name, seconds in one.speed.parts.items() if seconds > 0]
    times.append(("in all", f"{one.speed.step_s:.3f}"))
    for i in range(max(len(sizes), len(times))):
        row = (*(sizes[i] if i < len(sizes) else ("", "")), *(times[i] if i < len(times) else ("", "")))
        table.add_row(*row)
    return table


def alternatives(one: Outlook, config: Config, rates: Rates | None, base: float | None) -> dict[tuple, Outlook]:
    """The same training under each ZeRO stage and way of gradient checkpointing, by (stage, mode).

    ZeRO-0 in bf16 is left out: DeepSpeed computes it with another optimizer, and engine.py refuses it.
    """
    found, asked = {}, config.engine.reduce_gradients
    for stage in STAGES:
        if stage == 0 and one.case.precision == "bf16":
            continue
        at_stage = one.case.at_stage(stage, asked if asked != "step" or stage in (1, 2) else "auto")
        for mode in fitting.modes(config, one.case):
            found[stage, mode] = outlook(replace(at_stage, recompute=mode), one.device, rates, base)
    return found


def grid(rows: dict[tuple, Outlook], asked: Case) -> Table:
    """Each alternative in a line; a star is the recipe's own."""
    table = _table("ZeRO", "checkpointing", "GiB", "fits", "step s", "tokens/s", "MFU")
    for (stage, mode), row in rows.items():
        own = "*" if (stage, mode) == (asked.stage, asked.recompute) else ""
        how = f"every {mode}." if isinstance(mode, int) else mode
        table.add_row(
            f"{stage}{own}", how, f"{row.memory.total / GIB:.2f}", "yes" if row.fits else "no",
            f"{row.speed.step_s:.3f}", f"{row.speed.tokens_per_s:,.0f}", f"{row.speed.mfu:.1%}",
        )  # fmt: skip
    return table


def plan_line(one: Outlook, config: Config) -> str:
    """Hours and disk of the whole plan."""
    plan = Plan(config.phases)
    hours = plan.last_step * one.speed.step_s / 3600
    tokens = plan.last_step * one.case.tokens_per_step
    count, size = most_checkpoints(plan, config), checkpoint_bytes(one.case)
    return (
        f"{plan.last_step:,} steps, {tokens / 1e9:,.2f} billion tokens: {hours:,.1f} hours without evaluation and "
        f"sampling; on disk at most {count} checkpoints of {size / GIB:.2f} GiB, {count * size / GIB:.1f} GiB"
    )


def checkpoint_bytes(case: Case) -> float:
    """As Engine.checkpoint_bytes: the weights twice, for DeepSpeed and as safetensors, masters and moments."""
    return case.shape.parameters * (2 * case.width_bytes + MASTER + MOMENTS)


def most_checkpoints(plan: Plan, config: Config) -> int:
    """How many there are at the fullest: those that are kept, and the one that is written before another goes."""
    keep, every, last = config.checkpoint, config.checkpoint.every, plan.last_step
    ends = {phase.last for phase in plan.phases}
    due = ends | (set(range(every, last + 1, every)) if every else set())
    kept = set(sorted(due)[-keep.keep_last :]) | ends
    kept |= {step for step in due if keep.keep_every and step % keep.keep_every == 0}
    return min(len(due), len(kept) + keep.keep_best + 1)


def advice(one: Outlook, rows: dict[tuple, Outlook]) -> Iterator[str]:
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
    yield from _stages(fitting, asked)
    row = fitting[fastest]
    yield (
        f"the fastest that fits: ZeRO-{fastest[0]}, gradient checkpointing {fastest[1]}: "
        f"{row.speed.tokens_per_s:,.0f} tokens/s in {row.memory.total / GIB:.1f} GiB a rank"
    )


def _stages(fitting: dict[tuple, Outlook], asked: Case) -> Iterator[str]:
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


def _table(*heads: str) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for i, head in enumerate(heads):
        table.add_column(
            head,
            justify="left"
            if i == 0 or not head.strip() or head in ("fits", "checkpointing", "time of a step")
            else "right",
        )
    return table
