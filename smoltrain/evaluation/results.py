"""The evaluations of a run as its folder keeps them: RUN/evaluations/step-N.json, a file for each step.

As in {"step": 50, "tasks": {"hellaswag": {"acc": 0.31, "acc_stderr": 0.005}}, "details": {"hellaswag": {...}}}.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from smoltrain import files
from smoltrain.errors import Problem, UserError, exception_message

EVALUATIONS_FOLDER = "evaluations"


class TaskDetails(TypedDict):
    """How a task was measured."""

    num_fewshot: int
    limit: int | None  # documents at most; None: all of them
    documents: int  # that were measured
    task_version: str
    versions: dict[str, str]  # of smoltrain, lm_eval, torch
    device: str
    dtype: str  # in which the model computed
    time: str  # ISO 8601, UTC
    seconds: float


class Evaluation(TypedDict):
    """What is known of one step."""

    step: int
    tasks: dict[str, dict[str, float]]  # a metric's standard error stands beside it as METRIC_stderr
    details: dict[str, TaskDetails]


def is_limited(details: TaskDetails) -> bool:
    """Whether a task was, or a task of a group may have been, measured on a part of its documents."""
    limit = details["limit"]
    return limit is not None and not 0 < details["documents"] < limit


def evaluation_file(run: Path, step: int) -> Path:
    """Where the evaluations of a step stand."""
    return run / EVALUATIONS_FOLDER / f"step-{step}.json"


def read_evaluations(run: Path) -> list[Evaluation]:
    """Those of all steps, in their order; [] for a run that nobody has evaluated. Errors: UserError for a damaged one.

    A task that was measured twice at a step stands there as it was measured last.
    """
    found = [_read_file(path) for path in (run / EVALUATIONS_FOLDER).glob("step-*.json")]
    return sorted(found, key=lambda evaluation: evaluation["step"])


def read_evaluation(run: Path, step: int) -> Evaluation | None:
    """That of one step; None for a step that nobody has evaluated. Errors: UserError for a damaged file."""
    path = evaluation_file(run, step)
    return _read_file(path) if path.exists() else None


def write_evaluation(run: Path, new: Evaluation) -> Path:
    """Add the tasks of an evaluation to what is there of its step; the file."""
    path = evaluation_file(run, new["step"])
    known = read_evaluation(run, new["step"]) or Evaluation(step=new["step"], tasks={}, details={})
    path.parent.mkdir(exist_ok=True)
    tasks = known["tasks"] | new["tasks"]
    details = known["details"] | new["details"]
    files.write_json_file(path, Evaluation(step=new["step"], tasks=tasks, details=details))
    return path


def _read_file(path: Path) -> Evaluation:
    want = "an evaluation as `smoltrain eval` writes it"
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problem = Problem("an evaluation cannot be read", exception_message(error), want, str(path))
        raise UserError(problem) from None
    try:
        return TypeAdapter(Evaluation).validate_python({"details": {}} | value, strict=True)  # details may be missing
    except (TypeError, ValidationError):
        raise UserError(Problem("this is no evaluation", "other keys", want, str(path))) from None
