"""How long the rest of a command will take: what its plan still holds, at the medians of what was measured."""

from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from smoltrain.config.schema import Config
from smoltrain.schedule import Plan

RECENT_STEPS = 51  # whose median a step is taken to last: one that waited for something moves nothing
RECENT_OTHERS = 5  # evaluations, samplings, saves and starts

STEP_S = "speed/step_s"  # the names in METRICS (track.py) under which durations are logged
EVALUATION_S = "speed/evaluation_s"
TASK_EVALUATION_S = "speed/task_evaluation_s"
SAMPLING_S = "speed/sampling_s"
MEMORISATION_S = "speed/memorisation_s"
PAUSE_S = "speed/checkpoint_pause_s"
START_S = "speed/start_s"
PREPARATION_S = "speed/preparation_s"  # of it; a command that goes on with its next phase has its data
CLOSING_S = "speed/closing_s"  # plots, and the checkpoint that is being written
OTHERS = (EVALUATION_S, TASK_EVALUATION_S, SAMPLING_S, MEMORISATION_S, PAUSE_S, START_S, CLOSING_S)


class TimeLeft:
    """Steps, evaluations, samplings and saves that are still to come, each at the median of the recent ones.

    What has not been measured yet counts nothing, but for steps: without one there is no estimate.
    """

    def __init__(self, config: Config, last_step: int, *, restarts: bool = False) -> None:
        """`last_step` is where the command ends; with `restarts` each phase begins with a start of new processes."""
        self._config = config
        self._plan = Plan(config.phases)
        self._last_step = last_step
        self._restarts = restarts
        self._steps: deque[float] = deque(maxlen=RECENT_STEPS)
        self._others: dict[str, deque[float]] = {name: deque(maxlen=RECENT_OTHERS) for name in OTHERS}

    def add_past(self, metrics: Mapping[str, Any]) -> None:
        """Learn from what an earlier start of the run logged: not from its steps, which other devices may have done."""
        for name in OTHERS:
            if name in metrics:
                left_out_s = metrics.get(PREPARATION_S, 0.0) if name == START_S else 0.0
                self._others[name].append(metrics[name] - left_out_s)

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Learn from what was just logged."""
        self.add_past(metrics)
        if STEP_S in metrics:
            self._steps.append(metrics[STEP_S])

    def estimate_s(self, step: int) -> float | None:
        """Seconds from the end of `step` to the end of the command; None before there was a step."""
        if not self._steps:
            return None
        remaining = {STEP_S: self._last_step - step, **self._count_others(step)}
        durations = {STEP_S: self._steps, **self._others}
        return sum(number * median(durations[name]) for name, number in remaining.items() if durations[name])

    def _count_others(self, step: int) -> dict[str, int]:
        plan = self._plan
        config = self._config
        last = self._last_step
        save_every = config.checkpoint.every or plan.last_step  # the end of a phase is saved whatever it says
        num_starts = sum(step < phase.first <= last for phase in plan.phases[1:])
        return {
            EVALUATION_S: count_due(plan, config.evaluate.every, step, last),
            TASK_EVALUATION_S: count_due(plan, config.evaluate.tasks_every, step, last),
            SAMPLING_S: count_due(plan, config.sample.every, step, last),
            MEMORISATION_S: count_due(plan, config.evaluate.memorisation_every, step, last),
            PAUSE_S: count_due(plan, save_every, step, last),
            START_S: num_starts if self._restarts else 0,
            CLOSING_S: num_starts + 1 if self._restarts else 1,
        }


def count_due(plan: Plan, every: int, after: int, until: int) -> int:
    """How often something with this cadence is due after steps after+1..until: Plan.is_due, counted."""
    count = 0
    for phase in plan.phases:
        first_done = max(after, phase.first - 1)
        last = min(until, phase.last)
        if every > 0 and last > first_done:
            count += last // every - first_done // every
            count += last == phase.last and last % every > 0  # the end of a phase is always due
    return count
