"""What a run's folder keeps of its evaluations."""

import json
from pathlib import Path

import pytest

from smoltrain.errors import UserError
from smoltrain.evaluation.results import (
    Evaluation,
    TaskDetails,
    evaluation_file,
    read_evaluation,
    read_evaluations,
    write_evaluation,
)

DETAILS = TaskDetails(
    num_fewshot=0, limit=None, documents=64, task_version="1.0", versions={"lm_eval": "0.4.13"}, device="cpu",
    dtype="float32", time="2026-11-30T12:00:00+00:00", seconds=1.5,
)  # fmt: skip


def evaluation(step: int, **tasks: float) -> Evaluation:
    metrics = {name: {"acc": value, "acc_stderr": 0.01} for name, value in tasks.items()}
    return Evaluation(step=step, tasks=metrics, details=dict.fromkeys(tasks, DETAILS))


def test_tasks_of_a_step_come_together_and_the_newest_counts(tmp_path: Path) -> None:
    assert read_evaluations(tmp_path) == []
    write_evaluation(tmp_path, evaluation(100, arc=0.25))
    write_evaluation(tmp_path, evaluation(20, arc=0.5))
    write_evaluation(tmp_path, evaluation(100, hellaswag=0.3))
    path = write_evaluation(tmp_path, evaluation(100, arc=0.75))
    assert path == evaluation_file(tmp_path, 100) == tmp_path / "evaluations" / "step-100.json"
    assert read_evaluations(tmp_path) == [evaluation(20, arc=0.5), evaluation(100, arc=0.75, hellaswag=0.3)]
    assert json.loads(path.read_text())["tasks"]["arc"] == {"acc": 0.75, "acc_stderr": 0.01}


NOT_EVALUATIONS = (
    "{", "[]", '{"step": 3}', '{"step": "3", "tasks": {}}', '{"step": 3, "tasks": [1]}',
    '{"step": 3, "tasks": {"arc": 0.5}}', '{"step": 3, "tasks": {"arc": {"acc": "0.5"}}}',
    '{"step": 3, "tasks": {}, "details": {"arc": 10}}',
)  # fmt: skip


@pytest.mark.parametrize("text", NOT_EVALUATIONS)
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    path = evaluation_file(tmp_path, 3)
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(UserError, match=r"step-3\.json"):
        read_evaluations(tmp_path)
    with pytest.raises(UserError, match=r"step-3\.json"):
        write_evaluation(tmp_path, evaluation(3, arc=0.5))
    assert read_evaluation(tmp_path, 4) is None
