"""Tasks of lm-evaluation-harness: which there are, where their documents come from, and what is made of the answers."""

import json
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from smoltrain.errors import UserError
from smoltrain.evaluation.judge import LoadedJudge
from smoltrain.inference.load import LoadedModel

pytest.importorskip("lm_eval", reason="needs the extra `eval`")

from smoltrain.evaluation import harness
from smoltrain.evaluation.harness import LOCAL_TASK, SENTENCES_FILE, check_task_names, load_tasks, measure_tasks
from smoltrain.evaluation.harness_model import HarnessModel
from tests.evaluation import parity

pytestmark = [
    pytest.mark.slow,  # lm_eval takes four seconds to import
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
LINES = [json.loads(line) for line in SENTENCES_FILE.read_text(encoding="utf-8").splitlines()]


def random_states() -> list[Any]:
    numpy_state: Any = np.random.get_state()
    return [random.getstate(), numpy_state[1].tolist(), torch.get_rng_state().tolist()]


def test_the_sentences_count_as_by_hand_and_leave_random_numbers_alone(loaded: LoadedModel) -> None:
    ours = HarnessModel(LoadedJudge(loaded))
    random.seed(5)
    np.random.seed(5)
    before = random_states()
    tasks = load_tasks([LOCAL_TASK], say=lambda _: pytest.fail("nothing is to be downloaded"))
    found = measure_tasks(tasks, LoadedJudge(loaded))
    assert random_states() == before
    assert (len(LINES), len({line["right"] for line in LINES})) == (64, 64)
    asked = [("", line[key]) for line in LINES for key in ("right", "wrong")]
    likely = [value for value, _ in ours.loglikelihood(parity.requests("loglikelihood", *asked))]
    is_right = [right > wrong for right, wrong in zip(likely[::2], likely[1::2], strict=True)]
    assert found.metrics[LOCAL_TASK]["acc"] == sum(is_right) / 64
    assert found.metrics[LOCAL_TASK].keys() == {"acc", "acc_stderr"}
    assert found.metrics[LOCAL_TASK]["acc_stderr"] == pytest.approx(np.std(is_right, ddof=1) / 8)
    assert (found.num_documents, found.num_fewshot, found.notes) == ({LOCAL_TASK: 64}, {LOCAL_TASK: 0}, ())
    again = measure_tasks(tasks, LoadedJudge(loaded), limit=8)
    assert again.num_documents == {LOCAL_TASK: 8}
    assert again.metrics[LOCAL_TASK]["acc"] == sum(is_right[:8]) / 8
    assert measure_tasks(tasks, LoadedJudge(loaded)) == found


def test_examples_stand_before_a_question(loaded: LoadedModel) -> None:
    tasks = load_tasks([LOCAL_TASK], fewshot=1, say=lambda _: None)
    found = measure_tasks(tasks, LoadedJudge(loaded), limit=4)
    assert found.num_fewshot == {LOCAL_TASK: 1}


def test_an_unknown_task_is_named_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    class FewTasks:
        def __init__(self, needs_index: bool) -> None:
            self.all_tasks = ["hellaswag", "arc_easy"] if needs_index else []

    monkeypatch.setattr(harness, "_open_manager", FewTasks)
    check_task_names([LOCAL_TASK, "arc_easy"])
    with pytest.raises(UserError, match="no such task: saw 'helaswag', want 'hellaswag'"):
        check_task_names(["helaswag"])


@pytest.mark.parametrize("name", ["far", "group", "tag"])
@pytest.mark.parametrize("offline", ["1", ""])
def test_documents_of_the_hub_are_told_before_and_their_lack_is_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str, offline: str
) -> None:
    def load(specs: list[Any]) -> None:
        assert len(said) == 1, "told before anything is downloaded"
        raise ConnectionError(f"no\nanswer for {specs}")

    said: list[str] = []
    index = {
        "far": SimpleNamespace(cfg={"dataset_path": "somebody/far"}, tags=set()),
        "near": SimpleNamespace(cfg={"dataset_path": "json"}, tags=set()),
        "group": SimpleNamespace(cfg={"group": "group", "task": ["near", {"task": "far"}]}, tags=set()),
        "tag": SimpleNamespace(cfg=None, tags={"far", "near"}),
    }
    manager = SimpleNamespace(task_index=index, all_tasks=list(index), load=load)
    monkeypatch.setattr(harness, "_open_manager", lambda needs_index: manager)
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    with pytest.raises(UserError) as refused:
        load_tasks([name], say=said.append)
    how = "from the cache of the Hugging Face Hub (HF_HUB_OFFLINE is set)"
    if not offline:
        how = "of the Hugging Face Hub; what is not in its cache is downloaded now"
    assert said == [f"{name}: reads somebody/far {how}"]
    assert str(refused.value).startswith(
        f"the documents of {name} cannot be loaded: saw ConnectionError: no answer for ['{name}'], want documents in "
    )
