"""lm-evaluation-harness on our model: the log-likelihoods and texts of its own class, HFLM, over the export."""

import json
import random
from pathlib import Path
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
from smoltrain.evaluation.harness import (
    LOCAL_TASK,
    SENTENCES_FILE,
    HarnessModel,
    check_task_names,
    load_tasks,
    measure_tasks,
)
from tests.evaluation import parity

pytestmark = [
    pytest.mark.slow,  # lm_eval takes four seconds to import
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
LINES = [json.loads(line) for line in SENTENCES_FILE.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def theirs(exported: Path) -> Any:
    return parity.load_their_model(exported)


@pytest.fixture
def ours(loaded: LoadedModel) -> HarnessModel:
    return HarnessModel(LoadedJudge(loaded))


def test_each_kind_of_request_is_answered_as_by_the_harness_own_class(ours: HarnessModel, theirs: Any) -> None:
    rows = parity.compare(ours, theirs)
    assert [row.num_requests for row in rows] == [28, 6, 5]
    assert max(row.largest for row in rows) < parity.LIMIT
    assert [row.num_equal for row in rows] == [28, 6, 5]
    page = parity.PAGE.read_text(encoding="utf-8")
    for row in rows:
        assert f"| `{row.kind}` | {row.num_requests} | " in page
        assert f" | {row.num_equal} of {row.num_requests} |" in page
    mine, their_own = parity.measure_sentences(ours, theirs)
    assert mine == their_own
    assert ours.describe_cuts()[0].startswith("4 of ")


def test_a_text_that_cannot_be_scored_whole_is_refused(ours: HarnessModel) -> None:
    with pytest.raises(UserError, match="cannot score: saw 480 tokens, want 1 to 64"):
        ours.loglikelihood(parity.requests("loglikelihood", ("the king", " of Naples and Milan" * 40)))


def test_a_text_to_write_gets_half_of_the_positions_and_that_is_told(ours: HarnessModel) -> None:
    options = {"max_gen_toks": 20, "until": ["q"]}
    ours.generate_until(parity.requests("generate_until", ("the king of Naples", options)))
    assert ours.describe_cuts() == []
    ours.generate_until(parity.requests("generate_until", ("the king", {"max_gen_toks": 256, "until": []})))
    assert ours.describe_cuts() == [
        "1 of 2 texts to write had less room than their task allows: the model's 64 positions"
    ]


def random_states() -> list[Any]:
    numpy_state: Any = np.random.get_state()
    return [random.getstate(), numpy_state[1].tolist(), torch.get_rng_state().tolist()]


def test_the_sentences_count_as_by_hand_and_leave_random_numbers_alone(loaded: LoadedModel, ours: HarnessModel) -> None:
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
