"""The recipe's tasks of lm-evaluation-harness, checked and loaded before a run trains."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from smoltrain.config.schema import Config
from smoltrain.distributed.world import World

if TYPE_CHECKING:
    from smoltrain.evaluation.harness import HarnessTasks


def check_run_tasks(config: Config) -> None:
    """Errors: UserError if a task of the recipe is none, or lm-evaluation-harness is not installed."""
    if config.evaluate.tasks:
        from smoltrain.evaluation import harness  # lm_eval, which takes seconds

        harness.check_task_names(config.evaluate.tasks)


def load_run_tasks(config: Config, world: World, say: Callable[[str], None]) -> "HarnessTasks | None":
    """The recipe's tasks with their documents, on the first rank; None elsewhere, and without any. Collective.

    Errors: UserError, on every rank, for what cannot be loaded.
    """
    if not config.evaluate.tasks:
        return None
    tasks: list[HarnessTasks] = []

    def load() -> None:
        from smoltrain.evaluation import harness

        tasks.append(harness.load_tasks(config.evaluate.tasks, say=say))

    world.run_on_first_rank(load, patient=True)
    return tasks[0] if tasks else None
