"""The demo's checkpoints: loaded when they are asked for, kept as long as they write, listed as they come and go."""

import shutil
from pathlib import Path

import pytest

from smoltrain.errors import UserError
from smoltrain.inference import demo_models
from smoltrain.inference.demo_models import DemoModels, ListedCheckpoint, describe_checkpoint
from smoltrain.inference.load import LoadedModel, load_trained_model
from tests import folders


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """The steps that were loaded, in order."""
    seen: list[int | None] = []

    def counted(source: str, step: int | None) -> LoadedModel:
        seen.append(step)
        return load_trained_model(source, step)

    monkeypatch.setattr(demo_models, "load_trained_model", counted)
    return seen


def test_checkpoints_are_loaded_when_they_are_asked_for_and_kept(tmp_path: Path, loads: list[int | None]):
    run = folders.run(tmp_path, steps=(8, 9, 12))
    folders.evaluate(run, 9, 3.5)
    models = DemoModels(str(run))
    assert models.list_checkpoints() == [
        ListedCheckpoint(12, None), ListedCheckpoint(9, 3.5), ListedCheckpoint(8, None),
    ]  # fmt: skip
    for steps, kept in (([12], [12]), ([8, 12], [8, 12]), ([], [8, 12]), ([12, 9], [12, 9]), ([8], [8])):
        assert [loaded.step for loaded in models.load(steps)] == kept
    assert loads == [None, 8, 9, 8]
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    with pytest.raises(UserError, match="no checkpoint of this step: saw 12, want one of 8, 9"):
        models.load([12])
    assert [loaded.step for loaded in models.load()] == [8], "what does not load leaves those before it"
    (run / "checkpoints" / "step-00000009" / "manifest.json").write_text("{}")
    assert models.list_checkpoints() == [ListedCheckpoint(9, None), ListedCheckpoint(8, None)]


def test_a_loss_is_named_where_there_is_one():
    assert describe_checkpoint(12000, 3.21456) == "step 12,000 · validation loss 3.2146"
    assert describe_checkpoint(9, None) == "step 9"
