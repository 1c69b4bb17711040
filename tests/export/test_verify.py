"""What an export is compared by, and what makes it another model."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from smoltrain.data.tokens.load_prepared import load_prepared_data
from smoltrain.errors import TrainingStopped, UserError
from smoltrain.export import verify
from smoltrain.export.verify import (
    VerificationPrompt,
    _check_ids_and_text,
    _max_logit_difference,
    _read_held_out_ids,
    make_verification_prompts,
    verify_export,
)
from smoltrain.inference.load import LoadedModel, load_trained_model
from tests import folders


def test_what_transformers_says_is_told(loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    said = subprocess.CompletedProcess([], 1, "", "Traceback\n  ...\nValueError: no such class\n")
    monkeypatch.setattr(verify.subprocess, "run", lambda *words, **options: said)
    with pytest.raises(TrainingStopped, match=r"cannot load the export: ValueError: no such class"):
        verify_export(loaded, tmp_path)


def test_another_text_or_tokenizer_is_a_mismatch(loaded: LoadedModel):
    case = VerificationPrompt([5, 6, 7], None, 3)
    with pytest.raises(TrainingStopped, match="the export goes on with another text"):
        _check_ids_and_text(loaded, case, {"ids": None, "new": [1, 2, 3], "text": "other"})
    with pytest.raises(TrainingStopped, match="tokenizer gives other ids for 'The'"):
        _check_ids_and_text(loaded, VerificationPrompt([5], "The"), {"ids": [6], "new": [], "text": ""})


def test_numbers_that_are_none_are_a_mismatch(loaded: LoadedModel):
    logits = loaded.model(torch.tensor([[1, 2]]))[0]
    assert _max_logit_difference(loaded, VerificationPrompt([1, 2]), logits) == 0
    assert _max_logit_difference(loaded, VerificationPrompt([1, 2]), logits * float("nan")) == float("inf")
    assert _max_logit_difference(loaded, VerificationPrompt([1, 2]), logits[:1]) == float("inf")


@pytest.mark.parametrize("room", [1, 2, 3, 64, 100_000])
def test_cases_fit_the_model(loaded: LoadedModel, room: int, monkeypatch: pytest.MonkeyPatch):
    section = loaded.model.section.model_copy(update={"max_position_embeddings": room})
    monkeypatch.setattr(loaded.model, "_section", section)
    cases = make_verification_prompts(loaded)
    assert len(cases) == 16
    assert all(case.ids and len(case.ids) + case.new_tokens <= room for case in cases)
    assert cases[0].ids == loaded.tokenizer.encode("**ROMEO**  \n")[: len(cases[0].ids)]
    assert len(cases[-1].ids) == min(room, 256)
    if room >= 64:
        assert [case.new_tokens for case in cases[:4]] == [32] * 4
        assert cases[0].text == "**ROMEO**  \n"
        assert cases[7].ids == _read_held_out_ids(loaded)[:32]
    without_data = replace(loaded, folder=Path("nowhere"), config=None)
    assert len(make_verification_prompts(without_data)) == 16


def test_a_run_that_was_copied_without_its_cache_is_compared_on_other_prompts(tmp_path: Path):
    made = load_trained_model(str(folders.run(tmp_path, f"data.cache={tmp_path / 'cache'}")))
    assert _read_held_out_ids(made)
    shutil.rmtree(tmp_path / "cache")
    assert made.config is not None
    with pytest.raises(UserError, match=r"validation-00000\.bin is missing: saw no such file, want \S+ bytes"):
        load_prepared_data(made.config)
    assert _read_held_out_ids(made) == []
    assert len(make_verification_prompts(made)) == 16


def test_tensors_without_a_place_are_a_mismatch(loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    answers: dict[str, Any] = {"not_loaded": ["lm_head.weight"]}
    monkeypatch.setattr(verify, "_reload_in_fresh_process", lambda *_: answers)
    with pytest.raises(TrainingStopped, match=r"could not place tensors of the export: \['lm_head.weight'\]"):
        verify_export(loaded, tmp_path)
