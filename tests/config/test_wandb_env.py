"""W&B's variables and settings files, read as wandb itself and transformers' callback read them."""

import importlib.util
import os
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from smoltrain.config.load import config_to_yaml, load_config
from smoltrain.config.wandb_env import (
    LOG_MODEL_VALUES,
    MIN_WATCH_STEPS,
    MODE_VARIABLES,
    TEXT_VARIABLES,
    read_wandb_environment,
)
from smoltrain.run.track import Tracker
from smoltrain.run.wandb_connection import resolve_wandb_mode
from tests import tiny

KEY = "k" * 40


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny.forget_wandb(tmp_path, monkeypatch)
    return tmp_path


def settle(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    for word in words.split():
        name, _, value = word.partition("=")
        monkeypatch.setenv(name, value.replace("KEY", KEY))


# ---- keys of `track`


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        ("WANDB_PROJECT=p", "wandb_project", "p"),
        ("WANDB_ENTITY=team", "wandb_entity", "team"),
        ("WANDB_NAME=n", "wandb_name", "n"),
        ("WANDB_RUN_ID=abc", "wandb_id", "abc"),
        ("WANDB_NOTES=off", "wandb_notes", "off"),
        ("WANDB_RUN_GROUP=1", "wandb_group", "1"),
        ("WANDB_TAGS=a,b,,c", "wandb_tags", ("a", "b", "c")),
        ("WANDB_LOG_MODEL=checkpoint", "wandb_model", "checkpoint"),
        ("WANDB_LOG_MODEL=END", "wandb_model", "end"),
        ("WANDB_LOG_MODEL=false", "wandb_model", "none"),
        ("WANDB_LOG_MODEL=true", "wandb_model", "none"),
        ("WANDB_WATCH=false", "gradients_every", 0),
        ("WANDB_WATCH=gradients", "gradients_every", 100),
        ("WANDB_WATCH=all", "gradients_every", 100),
        ("WANDB_WATCH=parameters", "gradients_every", 0),
        ("WANDB_PROJECT=", "wandb_project", "mine"),
    ],
)
def test_the_environment_wins_over_the_recipe_and_the_command_line_over_both(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: str, key: str, value: Any
) -> None:
    settle(monkeypatch, words)
    text = config_to_yaml(load_config("quickstart")).replace("wandb_project: smoltrain", "wandb_project: mine")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(re.sub(r"gradients_every: \d+", "gradients_every: 0", text), encoding="utf-8")
    monkeypatch.delenv(words.partition("=")[0])
    usual = load_config(str(recipe)).track
    settle(monkeypatch, words)
    assert getattr(load_config(str(recipe)).track, key) == value
    typed = {"wandb_tags": "[x]", "wandb_model": "phase", "gradients_every": "7"}.get(key, "x")
    loaded = load_config(str(recipe), [f"track.{key}={typed}"]).track
    assert getattr(loaded, key) == {"wandb_tags": ("x",), "gradients_every": 7}.get(key, typed)
    assert loaded.model_dump(exclude={key}) == usual.model_dump(exclude={key}), "nothing else"


@pytest.mark.parametrize(("recipe", "every"), [("50", 50), ("5_0", 50), ("5e1", 50), ("0", 300), ("x", 300)])
def test_gradients_are_watched_as_often_as_the_recipe_does_or_transformers(recipe: str, every: int) -> None:
    (found,) = read_wandb_environment({"gradients_every": recipe, "print_every": "300"}, {"WANDB_WATCH": "gradients"})
    assert (found.key, found.value, found.note) == ("gradients_every", every, None)


def test_what_transformers_reads_is_read() -> None:
    spec = importlib.util.find_spec("transformers")
    assert spec
    assert spec.origin
    path = Path(spec.origin).parent / "integrations" / "integration_utils.py"  # whose import takes seconds
    source = path.read_text(encoding="utf-8")
    for name in ("WANDB_PROJECT", "WANDB_LOG_MODEL", "WANDB_WATCH"):
        assert f'os.getenv("{name}"' in source
    assert 'in ("all", "parameters", "gradients")' in source
    assert f"log_freq=max({MIN_WATCH_STEPS}, state.logging_steps)" in source
    model = source.partition("class WandbLogModel")[2].partition("@property")[0]
    assert re.findall(r'= "(\w+)"', model) == list(LOG_MODEL_VALUES)


def test_wandb_itself_reads_the_same_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    settings = wandb.Settings()
    settings.update_from_env_vars({name: f"x{i}" for i, name in enumerate(TEXT_VARIABLES)})
    fields = ("project", "entity", "run_name", "run_id", "run_notes", "run_group")
    assert [getattr(settings, name) for name in fields] == ["x0", "x1", "x2", "x3", "x4", "x5"]


def test_the_line_says_which_variable_was_heard_and_which_was_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    asked: dict[str, Any] = {}

    def init(**words: Any) -> Any:
        asked.update(words)
        return mock.MagicMock(resumed=False, url=None)

    monkeypatch.setattr(wandb, "init", init)
    settle(monkeypatch, "WANDB_PROJECT=theirs WANDB_ENTITY=team WANDB_TAGS=a,b WANDB_WATCH=all WANDB_MODE=OFFLINE")
    words = ["track.wandb=auto", "track.wandb_project=mine", "track.gradients_every=4"]
    settings = load_config("quickstart", [w for w in tiny.words(tmp_path, *words) if w != "track.wandb=off"])
    settings.run_folder.mkdir(parents=True)
    Tracker(settings, tiny.run_folder(settings.run_folder), 0, 0, 12).close(0)
    assert capsys.readouterr().out == (
        "W&B                    offline, WANDB_MODE=OFFLINE; run id 12345678; track.wandb_project=mine by the command "
        "line, not by WANDB_PROJECT; track.wandb_entity=team by WANDB_ENTITY; track.wandb_tags=a,b by WANDB_TAGS; "
        "track.gradients_every=4 by WANDB_WATCH; WANDB_WATCH=all: of what it may watch, gradients are logged\n"
    )
    assert (asked["project"], asked["entity"], asked["tags"], asked["mode"]) == ("mine", "team", ("a", "b"), "offline")


# ---- online, offline or off


SERVER = "http://127.0.0.1:18080"


@pytest.mark.parametrize(
    ("words", "files", "mode", "reason"),
    [
        ("WANDB_MODE=OFFLINE WANDB_API_KEY=KEY", {}, "offline", "WANDB_MODE=OFFLINE"),
        ("WANDB_MODE=dryrun WANDB_API_KEY=KEY", {}, "offline", "WANDB_MODE=dryrun"),
        ("WANDB_MODE=Disabled WANDB_API_KEY=KEY", {}, "off", "WANDB_MODE=Disabled"),
        ("WANDB_MODE=run WANDB_API_KEY=KEY", {}, "online", "an API key is configured"),
        ("WANDB_MODE= WANDB_API_KEY=KEY", {}, "online", "an API key is configured"),
        ("WANDB_MODE=shared WANDB_API_KEY=KEY", {}, "online", "an API key is configured, the only writer of a shared"),
        ("WANDB_MODE=cloudy WANDB_API_KEY=KEY", {}, "off", "W&B's own settings are wrong (mode: "),
        ("WANDB_DISABLED=true WANDB_API_KEY=KEY", {}, "off", "WANDB_DISABLED=true"),
        ("WANDB_DISABLED=false WANDB_API_KEY=KEY", {}, "online", "an API key is configured"),
        ("WANDB_IDENTITY_TOKEN_FILE=token", {"token": "x"}, "online", "an API key is configured"),
        (f"WANDB_BASE_URL={SERVER}", {".netrc": "127.0.0.1"}, "offline", f"no API key is configured for {SERVER} ("),
        (f"WANDB_BASE_URL={SERVER}", {".netrc": "127.0.0.1:18080"}, "online", "an API key is configured"),
        ("", {".netrc": "127.0.0.1:18080", ".config/wandb/settings": f"base_url = {SERVER}"}, "online", "an API key"),
        ("", {".netrc": "api.wandb.ai", ".config/wandb/settings": f"base_url = {SERVER}"}, "offline", "no API key"),
        ("", {".netrc": "api.wandb.ai"}, "online", "an API key is configured"),
        ("WANDB_API_KEY=KEY", {".config/wandb/settings": "mode = offline"}, "offline", "mode = offline in /"),
        ("WANDB_API_KEY=KEY", {"wandb/settings": "mode = offline"}, "offline", "mode = offline in /"),
        ("WANDB_API_KEY=KEY WANDB_MODE=online", {"wandb/settings": "mode = offline"}, "online", "an API key"),
        (
            "WANDB_API_KEY=KEY WANDB_CONFIG_DIR=etc",
            {"etc/settings": "mode = disabled"},
            "off",
            "mode = disabled in etc",
        ),
    ],
)
def test_auto_agrees_with_wandb(
    home: Path, monkeypatch: pytest.MonkeyPatch, words: str, files: dict[str, str], mode: str, reason: str
) -> None:
    from wandb.sdk import wandb_setup

    for name, text in files.items():
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        netrc = f"machine {text}\n  login user\n  password {KEY}\n"
        path.write_text(netrc if name == ".netrc" else f"[default]\n{text}\n", encoding="utf-8")
        path.chmod(0o600)
    settle(monkeypatch, words)
    found, why = resolve_wandb_mode(tiny.load(home, "track.wandb=auto"))
    assert (found, why[: len(reason)]) == (mode, reason)
    if "cloudy" in words or "WANDB_DISABLED=true" in words:
        return
    its = wandb_setup._WandbSetup(os.getpid()).settings.mode  # as wandb.init would begin
    named = {"dryrun": "offline", "disabled": "off", "run": "online", "shared": "online"}.get(its, its)
    assert named == mode or (named, why[:6]) == ("online", "no API"), "without a key wandb.init would fail"


@pytest.mark.parametrize("name", MODE_VARIABLES)
def test_the_mode_of_the_environment_wins_over_the_recipe_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(config_to_yaml(load_config("quickstart", ["track.wandb=offline"])), encoding="utf-8")
    assert load_config(str(recipe)).track.wandb == "offline"
    monkeypatch.setenv(name, "true" if name == "WANDB_DISABLED" else "disabled")
    loaded = load_config(str(recipe))
    assert resolve_wandb_mode(loaded)[0] == "off"
    assert resolve_wandb_mode(load_config(str(recipe), ["track.wandb=online"]))[0] == "online"
