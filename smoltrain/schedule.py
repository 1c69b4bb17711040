"""The plan of a run as pure functions of the step: its phase, learning rate and weight decay, what is due after it.

Step n is the n-th optimizer step, n = 1, 2, ...; everything logged or saved "at step n" is the state after n updates.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from smoltrain.config.schema import MAX_INT, PhaseSection
from smoltrain.errors import Problem, UserError


@dataclass(frozen=True)
class Phase:
    """A phase with its place in the plan: steps first..last, both included."""

    spec: PhaseSection
    first: int
    last: int

    @property
    def name(self) -> str:
        """The phase's name in the recipe."""
        return self.spec.name


class Plan:
    """All phases of a run, in order."""

    def __init__(self, phases: tuple[PhaseSection, ...]) -> None:
        """Errors: ValueError for a phase in tokens or epochs: `resolve_horizons` comes first."""
        ends = itertools.accumulate(phase.num_steps for phase in phases)
        self.phases = tuple(Phase(p, end - p.num_steps + 1, end) for p, end in zip(phases, ends, strict=True))
        self.last_step = self.phases[-1].last

    def phase(self, step: int) -> Phase:
        """The phase that step n belongs to. Errors: ValueError outside 1..last_step."""
        for phase in self.phases:
            if phase.first <= step <= phase.last:
                return phase
        raise ValueError(f"step {step} is outside the plan's 1..{self.last_step}")

    def named(self, name: str) -> Phase:
        """The phase of that name."""
        return next(p for p in self.phases if p.name == name)

    def last_step_until(self, phase: str | None) -> int:
        """The last step of the phase of that name; that of the whole plan for None."""
        return self.named(phase).last if phase else self.last_step

    def lr(self, step: int) -> float:
        """Learning rate of step n, a pure function of the step: no state survives a resume or a phase boundary."""
        phase = self.phase(step)
        while phase.spec.schedule == "continue":  # the schedule before, held at its end
            phase = self.phases[self.phases.index(phase) - 1]
            step = phase.last
        return scheduled_lr(phase.spec, step - phase.first)

    def weight_decay(self, step: int) -> float:
        """Decoupled weight decay of step n, to be multiplied by its learning rate."""
        return self.phase(step).spec.weight_decay

    def mix(self, step: int) -> dict[str, float] | None:
        """Weights of the data's sources in step n, by name; None: those that the sources themselves say."""
        return self.phase(step).spec.mix

    def resets_optimizer(self, step: int) -> bool:
        """Whether the optimizer's state is zeroed just before step n."""
        phase = self.phase(step)
        return step == phase.first and phase.spec.optimizer_state == "reset"

    def ends_phase(self, step: int) -> bool:
        """Whether step n is the last of its phase: always evaluated, sampled and saved."""
        return step == self.phase(step).last

    def is_due(self, step: int, every: int) -> bool:
        """Whether something with this cadence (steps; 0 is never) is due after step n."""
        return every > 0 and (step % every == 0 or self.ends_phase(step))


def describe_completion(plan: Plan, done: int, until: int | None = None) -> str:
    """What is complete after so many steps: the plan, or the phase that ends at step `until`, by default at `done`."""
    if done >= plan.last_step:
        return f"the plan is complete ({plan.last_step} steps)"
    end = done if until is None else until
    beyond = f", and the run is at step {done}" if done > end else ""
    return f"phase {plan.phase(end).name} is complete (step {end} of {plan.last_step}){beyond}"


# --- how long each phase is


def resolve_horizons(
    phases: tuple[PhaseSection, ...], tokens_per_step: int, epoch_tokens: int | None
) -> tuple[PhaseSection, ...]:
    """The same phases in steps: the fewest that train at least the tokens, or epochs, that each asks for.

    `tokens_per_step` are the targets of a step over all ranks, `epoch_tokens` those of all rows there are; None where
    that is not known, and no phase may be in epochs then. Phases in steps stay as they are.
    Errors: UserError for more steps than any run has, and for a phase that is shorter than its warm-up and decay.
    """
    resolved = tuple(_resolve_horizon(phase, tokens_per_step, epoch_tokens) for phase in phases)
    problems = [problem for pair in zip(phases, resolved, strict=True) for problem in _check_horizon(*pair)]
    if problems:
        raise UserError(*problems)
    return resolved


def _resolve_horizon(phase: PhaseSection, tokens_per_step: int, epoch_tokens: int | None) -> PhaseSection:
    if phase.tokens is not None:
        tokens = Fraction(phase.tokens)
    elif phase.epochs is not None:
        assert epoch_tokens is not None, "whoever asks for epochs has counted them"
        tokens = Fraction(str(phase.epochs)) * epoch_tokens  # exact: as a float, 0.07 epochs of 100 are above 7
    else:
        return phase
    steps = math.ceil(tokens / tokens_per_step)
    return phase.model_copy(update={"steps": steps, "tokens": None, "epochs": None})


def _check_horizon(asked: PhaseSection, resolved: PhaseSection) -> Iterator[Problem]:
    """What is wrong with the steps that were found for a phase."""
    key, [(name, value)] = f"phases.{asked.name}", asked.horizon.items()
    steps, least = resolved.num_steps, asked.warmup_steps + asked.decay_steps
    change = f"{key}.{name}"
    if name == "steps":
        return
    if steps > MAX_INT:
        yield Problem(f"{key} would be too long", f"{name}={value:,}, {steps:,} steps", f"at most {MAX_INT:,}", change)
    if least > steps:
        saw = f"{asked.warmup_steps} + {asked.decay_steps}"
        want = f"at most the {steps:,} steps that {name}={value:,} are"
        yield Problem(f"{key} is shorter than its warm-up and decay", saw, want, change)


def count_planned_steps(phases: tuple[PhaseSection, ...]) -> int | None:
    """Steps of all phases; None if one of them is still in tokens or epochs."""
    steps = [phase.steps for phase in phases]
    return None if None in steps else sum(number for number in steps if number is not None)


class StepSettings(NamedTuple):
    """All by which a step is trained."""

    phase: str
    lr: float
    weight_decay: float
    resets_optimizer: bool
    mix: dict[str, float] | None

    def __str__(self) -> str:
        reset = ", optimizer reset" if self.resets_optimizer else ""
        mix = f", mix {self.mix}" if self.mix else ""
        return f"phase {self.phase}, lr {self.lr:g}, weight decay {self.weight_decay:g}{reset}{mix}"


def step_settings(plan: Plan, step: int) -> StepSettings | None:
    """The settings of a step; None beyond the plan."""
    if step > plan.last_step:
        return None
    return StepSettings(
        plan.phase(step).name, plan.lr(step), plan.weight_decay(step), plan.resets_optimizer(step), plan.mix(step)
    )


def plan_from_phases(phases: Iterable[Any]) -> Plan:
    """The plan of phases as a run once wrote them down. Errors: ValidationError, which is a ValueError."""
    return Plan(tuple(PhaseSection.model_validate(phase) for phase in phases))


def first_differing_step(past: Plan, new: Plan, after: int) -> int | None:
    """The first step after `after` that one of two plans trains otherwise, or not at all; None if they are alike."""
    if past.phases == new.phases:  # without a look at each of millions of steps
        return None
    for step in range(after + 1, max(past.last_step, new.last_step) + 1):
        if step_settings(past, step) != step_settings(new, step):
            return step
    return None


def scheduled_lr(phase: PhaseSection, done: int) -> float:
    """Learning rate within a phase after `done` of its steps (0-based, as torch's schedulers count).

    Warm-up rises from lr/warmup, never from 0, so that the first step already learns.
    """
    assert phase.lr is not None, "schedule continue is resolved by Plan.lr"
    if done < phase.warmup_steps:
        return phase.lr * (done + 1) / phase.warmup_steps
    return SCHEDULES[phase.schedule](phase, phase.lr, done)


# --- the schedules after warm-up: (phase, its peak, steps done) -> learning rate


def hold_peak(_phase: PhaseSection, peak: float, _done: int) -> float:
    """The peak, to the end."""
    return peak


def fall_linearly(phase: PhaseSection, peak: float, done: int) -> float:
    """A straight line from the peak to final_lr."""
    return phase.final_lr + (peak - phase.final_lr) * (1 - _progress(phase, done))


def fall_by_cosine(phase: PhaseSection, peak: float, done: int) -> float:
    """Half a period of a cosine: Loshchilov & Hutter 2017, eq. 5."""
    return phase.final_lr + (peak - phase.final_lr) * 0.5 * (1 + math.cos(math.pi * _progress(phase, done)))


def fall_at_the_end(phase: PhaseSection, peak: float, done: int) -> float:
    """Warm-up, stable, decay: the peak, then a straight line over decay_steps; Hu et al. 2024 (MiniCPM)."""
    left = phase.num_steps - done
    if left > phase.decay_steps:
        return peak
    return phase.final_lr + (peak - phase.final_lr) * left / phase.decay_steps


def _progress(phase: PhaseSection, done: int) -> float:
    """0 at the first step after warm-up, 1 after the last step: no step is trained at final_lr itself."""
    return (done - phase.warmup_steps) / max(1, phase.num_steps - phase.warmup_steps)


# By the names of `schedule` in config/schema.py; "continue" is none of them: it holds the phase before (Plan.lr).
SCHEDULES: dict[str, Callable[[PhaseSection, float, int], float]] = {
    "constant": hold_peak,
    "linear": fall_linearly,
    "cosine": fall_by_cosine,
    "wsd": fall_at_the_end,
}
