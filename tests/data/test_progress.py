"""How far a long preparation is."""

import time
from pathlib import Path

import pytest

from smoltrain.data import progress
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokens import token_parts
from smoltrain.data.tokens.prepare import prepare_run_data
from tests.data.tokens.test_tokenise import given, twenty


@pytest.fixture
def root(tmp_path: Path):
    return twenty(tmp_path)


def test_a_long_preparation_says_how_far_it_is(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    Tokenizer.train_bpe(["This is document"], 262, "<|endoftext|>").save(root / "given")
    prepared = prepare_run_data(given(root))
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(progress, "REPORT_INTERVAL_S", 0)
    monkeypatch.setattr(progress, "POLL_INTERVAL_S", 0.001)
    tokenise = token_parts.TokeniseJob.tokenise_part

    def slow(work: token_parts.TokeniseJob, number: int) -> None:
        tokenise(work, number)
        time.sleep(0.5)

    monkeypatch.setattr(token_parts.TokeniseJob, "tokenise_part", slow)
    prepare_run_data(given(root, run__name="long"))
    *_, last = capsys.readouterr().out.splitlines()
    train, validation = len(prepared.train[0]), len(prepared.validation[0])
    assert last == f"data: {train:,} train tokens and {validation:,} validation tokens of 20 documents so far"
