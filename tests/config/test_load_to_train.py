"""A run's own config.yaml trains that run, wherever it lies now, or none."""

import shutil
from pathlib import Path

import pytest

from smoltrain.config.config_file import CONFIG_FILE
from smoltrain.config.load import config_to_yaml, list_recipes, load_config
from smoltrain.config.load_to_train import load_config_to_train
from smoltrain.errors import UserError


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """runs/first below the current folder, as a start with relative paths leaves it."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/first")
    (folder / "checkpoints").mkdir(parents=True)
    config = load_config("quickstart", run={"name": "first", "stop_after": "main"})  # as the supervisor has it
    (folder / CONFIG_FILE).write_text(config_to_yaml(config) + "provenance: {run_id: a}\n", encoding="utf-8")
    return folder


def test_the_config_of_a_run_goes_on_with_it(run: Path) -> None:
    own = load_config_to_train(str(run / CONFIG_FILE), ["seed=1"])
    assert own.run_folder == run
    assert own.run.stop_after is None, "all phases that are left"
    assert load_config_to_train(str(run / CONFIG_FILE), ["stop_after=main"]).run.stop_after == "main"
    shutil.copytree(run, "else where/copy")
    copied = str(Path("else where/copy") / CONFIG_FILE)
    there = load_config_to_train(copied, ["run.folder=else where", "run.name=copy"])
    assert there.run_folder == Path("else where/copy")
    assert load_config_to_train(copied, ["run.name=new"]).run_folder == Path("runs/new"), (
        "whoever names another means it"
    )


def test_a_copy_does_not_train_the_run_that_it_was_copied_from(run: Path) -> None:
    shutil.copytree(run, "else where/copy")
    with pytest.raises(UserError) as error:
        load_config_to_train("else where/copy/config.yaml", ["seed=1"])
    assert "names another folder: saw runs/first, want run.folder='else where' run.name=copy to" in str(error.value)


def test_from_another_folder_no_run_begins_unasked(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)
    with pytest.raises(UserError, match="names another folder: saw runs/first"):
        load_config_to_train("first/config.yaml", [])


def test_a_config_that_was_taken_out_of_its_run_is_a_recipe_like_any_other(run: Path) -> None:
    shutil.copy(run / CONFIG_FILE, CONFIG_FILE)
    assert load_config_to_train(CONFIG_FILE, []).run_folder == run
    assert load_config_to_train("quickstart", []).run_folder == Path("runs/quickstart")


@pytest.mark.parametrize("section", ["", "run: {seed: 3}\n"])
def test_somebodys_own_recipe_may_have_that_name_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("checkpoints").mkdir()
    text = list_recipes()["quickstart"].read_text(encoding="utf-8")
    assert "\nrun:" not in text
    Path(CONFIG_FILE).write_text(text + section, encoding="utf-8")
    assert load_config_to_train(CONFIG_FILE, []).run_folder == Path("runs/config")
