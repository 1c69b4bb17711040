"""lm-evaluation-harness on our model: the log-likelihoods and texts of its own class, HFLM, over the export."""

from pathlib import Path
from typing import Any

import pytest

from smoltrain.errors import UserError
from smoltrain.evaluation.judge import LoadedJudge
from smoltrain.inference.load import LoadedModel

pytest.importorskip("lm_eval", reason="needs the extra `eval`")

from smoltrain.evaluation.harness_model import HarnessModel
from tests.evaluation import parity

pytestmark = [
    pytest.mark.slow,  # lm_eval takes four seconds to import
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


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
    options = {"max_gen_toks": 20, "until": ["q", ""]}  # some tasks have an empty one, which ends nothing
    ours.generate_until(parity.requests("generate_until", ("the king of Naples", options)))
    assert ours.describe_cuts() == []
    ours.generate_until(parity.requests("generate_until", ("the king", {"max_gen_toks": 256, "until": []})))
    assert ours.describe_cuts() == [
        "1 of 2 texts to write had less room than their task allows: the model's 64 positions"
    ]
