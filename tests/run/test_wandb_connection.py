"""Whether a run goes to W&B: what the recipe asks for, what this machine is set to, and who answers."""

import re
from pathlib import Path
from typing import Any

import pytest

from smoltrain.run.wandb_connection import resolve_wandb_mode
from tests import launches, tiny, wandb_files
from tests.run.test_track import opened


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def netrc(path: Path, host: str) -> None:
    path.write_text(f"machine {host}\n  login user\n  password {'k' * 40}\n", encoding="utf-8")
    path.chmod(0o600)


@pytest.mark.parametrize("asked", ["online", "offline", "off"])
def test_what_the_recipe_asks_beats_everything(home: Path, monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert resolve_wandb_mode(tiny.load(home, f"track.wandb={asked}")) == (asked, "as track.wandb asks")


@pytest.mark.parametrize(
    ("environment", "mode", "reason"),
    [
        ({}, "offline", "no API key is configured"),
        ({"WANDB_MODE": "online"}, "offline", "no API key is configured"),
        ({"WANDB_API_KEY": ""}, "offline", "no API key is configured"),
        ({"WANDB_API_KEY": "k" * 40}, "online", "an API key is configured"),
        ({"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "online"}, "online", "an API key is configured"),
        ({"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "offline"}, "offline", "WANDB_MODE=offline"),
        ({"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "disabled"}, "off", "WANDB_MODE=disabled"),
    ],
)
def test_auto_looks_at_the_environment(
    home: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], mode: str, reason: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found, why = resolve_wandb_mode(tiny.load(home, "track.wandb=auto"))
    assert found == mode
    assert why.startswith(reason)


def test_auto_looks_for_the_servers_key_in_netrc(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tiny.load(home, "track.wandb=auto")
    netrc(home / ".netrc", "other.example")
    assert resolve_wandb_mode(settings)[0] == "offline"
    netrc(home / ".netrc", "api.wandb.ai")
    assert resolve_wandb_mode(settings) == ("online", "an API key is configured")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example:8080/")
    assert resolve_wandb_mode(settings)[0] == "offline"
    netrc(home / "elsewhere", "wandb.example")
    monkeypatch.setenv("NETRC", str(home / "elsewhere"))
    assert resolve_wandb_mode(settings)[0] == "offline", "wandb asks for the machine with its port"
    netrc(home / "elsewhere", "wandb.example:8080")
    assert resolve_wandb_mode(settings)[0] == "online"
    (home / "elsewhere").write_text("machine", encoding="utf-8")
    assert resolve_wandb_mode(settings)[0] == "offline", "a broken file is no key, and no error"


@pytest.mark.slow
def test_a_server_that_does_not_answer_costs_no_run(tmp_path: Path) -> None:
    output = tiny.train(
        tmp_path, "track.wandb=auto", "track.wandb_timeout_s=2", "phases.main.steps=2", "run.stop_after=main",
        "evaluate.every=0", "sample.every=0", "track.gradients_every=0", "checkpoint.every=0",
        WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="k" * 40,
    )  # fmt: skip
    assert output.returncode == 0, output.stdout + output.stderr
    (said,) = [line for line in output.stdout.splitlines() if line.startswith("W&B")]
    assert re.fullmatch(r"W&B +offline, going online failed \(.+\); run id [0-9a-f]{8}", said)
    assert "Traceback" not in output.stderr
    (path,) = tmp_path.glob("runs/quickstart/wandb/offline-run-*/run-*.wandb")
    offline = wandb_files.read_finished(path)
    assert said.endswith(offline.run_id)
    losses = {step: values["train/loss_nats_per_token"] for step, values in offline.steps.items()}
    assert losses == launches.losses(tmp_path / "runs" / "quickstart")


@pytest.mark.parametrize("asked", ["online", "offline"])
def test_a_wandb_that_cannot_even_write_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asked: str
) -> None:
    import wandb

    def fail(**_: Any) -> None:
        raise OSError("disk full\nand more")

    monkeypatch.setattr(wandb, "init", fail)
    monkeypatch.setattr(wandb, "teardown", lambda: None)
    tracker = opened(tmp_path, f"track.wandb={asked}")
    tracker.log_metrics(1, {"train/lr": 0.5})
    tracker.close(0)
    assert capsys.readouterr().out == "W&B                    off, W&B cannot write here (disk full)\n"
