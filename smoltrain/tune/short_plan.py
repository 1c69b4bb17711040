"""The plan of each run of a grid: the first phase of a recipe over so many steps, in the same proportions. Pure.

Every schedule of schedule.py is a function of the share of a phase that is done, of its warm-up and of its decay: with
these two as large a share as before, a phase of other steps has the same shape.
"""

from smoltrain.config.schema import PhaseSection
from smoltrain.errors import Problem, UserError

SHORT_SHARE = 0.5  # of a plan's steps: with fewer the best rate may be another one, which is said


def scale_phase(phase: PhaseSection, steps: int) -> PhaseSection:
    """The phase, which is in steps, over so many; what it had of warm-up and decay it still has, a step at least.

    Errors: UserError for fewer steps than these take.
    """
    warmup_steps = _scale_count(phase.warmup_steps, phase.num_steps, steps)
    decay_steps = _scale_count(phase.decay_steps, phase.num_steps, steps)
    if warmup_steps + decay_steps > steps:
        saw = f"{steps}, of them {warmup_steps} of warm-up and {decay_steps} of decay"
        raise UserError(Problem("--steps is too short for the schedule", saw, "more steps", "--steps"))
    return phase.model_copy(update={"steps": steps, "warmup_steps": warmup_steps, "decay_steps": decay_steps})


def _scale_count(count: int, of_steps: int, steps: int) -> int:
    """So many of `of_steps` as a share of `steps`, rounded to the nearest; never to nothing."""
    if count == 0:
        return 0
    return max(1, (2 * count * steps + of_steps) // (2 * of_steps))


def describe_short_plan(original: PhaseSection, short: PhaseSection, others: tuple[str, ...]) -> str:
    """What each run trains, beside what the recipe would."""
    text = f"{short.num_steps:,} steps of phase {short.name}"
    parts = {"warm-up": (short.warmup_steps, original.warmup_steps), "decay": (short.decay_steps, original.decay_steps)}
    shares = [f"{now:,} of {name}" for name, (now, _) in parts.items() if now]
    text += f", {' and '.join(shares)}" if shares else ""
    if short.num_steps != original.num_steps:
        before = [f"{was:,} of {name}" for name, (_, was) in parts.items() if was]
        text += f" (the recipe: {', '.join([f'{original.num_steps:,} steps', *before])})"
    return text + (f"; without {', '.join(others)}" if others else "")


def is_much_shorter(steps: int, planned_steps: int | None) -> bool:
    """Whether a run of so many steps says little about the plan's, as far as these are known."""
    return planned_steps is not None and steps < SHORT_SHARE * planned_steps
