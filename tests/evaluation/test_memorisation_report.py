"""`smoltrain memorisation`: its table, and for whom it has none. Real runs are in tests/training/test_memorise.py."""

import re
import shutil
from pathlib import Path

import pytest

from smoltrain.errors import UserError
from smoltrain.evaluation.memorisation_report import describe_run_memorisation
from tests import folders


def test_the_table_of_a_run_wherever_its_folder_lies(tmp_path: Path):
    run = folders.run(tmp_path / "made", "batch.sequence_length=32")
    shutil.move(run, tmp_path / "moved")
    with folders.one_thread():
        lines = describe_run_memorisation(str(tmp_path / "moved"), 8, 3).splitlines()
    assert "moved at step 8: 6 texts of at most 28 tokens, drawn at temperature 1 after prompts of 4" in lines[0]
    heads = ["after held-out prompts", "after training prompts", "in held-out text"]
    assert re.split(r"\s{2,}", lines[1].strip()) == heads
    assert lines[2].startswith("13-grams")
    assert re.split(r"\s{2,}", lines[3]) == ["50-grams", *["no text so long"] * 3]
    assert re.fullmatch(r"looked for in all [\d,]+ training tokens", lines[4])


def test_who_streamed_or_has_no_run_is_told_why(tmp_path: Path):
    streamed = folders.run(tmp_path, "data.mode=stream", "data.validation_share=0.3")
    with pytest.raises(UserError, match=r"nobody can say what the model copies.*streamed.*data\.mode=cached"):
        describe_run_memorisation(str(streamed), None, 2)
    folders.hub(tmp_path / "hub", folders.CHAT_SHAPE)
    with pytest.raises(UserError, match="nobody knows what this model was trained on"):
        describe_run_memorisation(str(tmp_path / "hub"), None, 2)
