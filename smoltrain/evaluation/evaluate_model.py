"""A trained model measured on tasks, and what came of it written into the run's folder: `smoltrain eval`."""

import datetime
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smoltrain.errors import Problem, UserError
from smoltrain.evaluation.judge import LoadedJudge
from smoltrain.evaluation.results import Evaluation, TaskDetails, is_limited, write_evaluation
from smoltrain.files import describe_error
from smoltrain.inference.device import move_to_best_device
from smoltrain.inference.load import LoadedModel, load_trained_model
from smoltrain.terminal import show_activity


@dataclass(frozen=True)
class EvaluationOptions:
    """What is measured, and how much of it."""

    tasks: Sequence[str]
    limit: int | None = None  # documents of each task
    fewshot: int | None = None  # examples before each question; None: as each task says


@dataclass(frozen=True)
class ModelEvaluation:
    """What came of it, and where it stands; None for a Hugging Face folder, which is left as it is, or if it cannot."""

    evaluation: Evaluation
    file: Path | None
    notes: tuple[str, ...]


def evaluate_model(
    run: str, options: EvaluationOptions, checkpoint: int | None, say: Callable[[str], None]
) -> ModelEvaluation:
    """Measure a model on tasks. Errors: UserError for a run, task or option that is none."""
    from smoltrain.evaluation import harness  # lm_eval, which takes seconds

    with show_activity("looking for the tasks"):
        harness.check_task_names(options.tasks)
    loaded = load_trained_model(run, checkpoint)
    chosen = move_to_best_device(loaded.model)
    say(f"computes on {chosen.device} in fp32" + (f": {chosen.reason}" if chosen.reason else ""))
    tasks = harness.load_tasks(options.tasks, fewshot=options.fewshot, say=say)
    began_s = time.perf_counter()
    with show_activity(f"measuring {', '.join(options.tasks)}"):
        results = harness.measure_tasks(tasks, LoadedJudge(loaded), options.limit)
    took_s = time.perf_counter() - began_s
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    details: dict[str, TaskDetails] = {
        name: TaskDetails(
            num_fewshot=results.num_fewshot.get(name, 0), limit=options.limit,
            documents=results.num_documents.get(name, 0), task_version=results.versions.get(name, ""),
            versions=harness.package_versions(), device=str(chosen.device), dtype="float32", time=now, seconds=took_s,
        )
        for name in results.metrics
    }  # fmt: skip
    evaluation = Evaluation(step=loaded.step or 0, tasks=results.metrics, details=details)
    if loaded.step is None:
        return ModelEvaluation(evaluation, None, results.notes)
    try:
        file = write_evaluation(loaded.folder, evaluation)
    except (OSError, UserError) as error:  # the numbers, which took a while, are printed all the same
        reason = describe_error(error) if isinstance(error, OSError) else str(error)
        lost = f"WARNING: these numbers are not kept in the run's folder: {reason}"
        return ModelEvaluation(evaluation, None, (*results.notes, lost))
    return ModelEvaluation(evaluation, file, results.notes)


def parse_task_names(text: str) -> list[str]:
    """The names in a list with commas. Errors: UserError if there is none."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise UserError(Problem("there is no task", repr(text), "names of tasks, with commas between", "--tasks"))
    return names


def format_metrics(evaluation: Evaluation) -> list[str]:
    """A line for each metric of each task, with its standard error and what it was measured on."""
    lines: list[str] = []
    for task, metrics in evaluation["tasks"].items():
        details = evaluation["details"][task]
        documents = f"{details['documents']:,} documents" if details["documents"] else "all of its tasks"
        limited = f", the first of them: --limit {details['limit']}" if is_limited(details) else ""
        for name, value in metrics.items():
            if name.endswith("_stderr"):
                continue
            error = metrics.get(f"{name}_stderr")
            spread = "" if error is None else f" ± {error:.4f}"
            lines.append(f"{task}  {name} {value:.4f}{spread}  ({documents}{limited}, {details['num_fewshot']}-shot)")
    return lines


def describe_source(loaded: LoadedModel) -> dict[str, Any]:
    """Which model it is, for --json."""
    return {"model": str(loaded.folder), "step": loaded.step, "device": str(loaded.model.device), "dtype": "float32"}
