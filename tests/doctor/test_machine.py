"""The verb: every check is there, a fault ends it with 1, and nothing is trained."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from smoltrain import cli
from smoltrain.doctor import child, machine
from smoltrain.doctor.needs import CPU_RANKS
from smoltrain.launch import supervisor
from smoltrain.training.preflight import check_recipe
from tests import preloaded, tiny

WITHOUT_RECIPE = [
    "python", "packages", "torch", "CUDA", "NCCL", "flash-attn", "bf16", "threads", "CPU clocks", "GPU clocks",
    "neighbours", "settings", "launcher", "open files", "locked memory", "memory", "/dev/shm", "runs", "cache",
    "all-reduce", "NCCL all-reduce",
]  # fmt: skip


def test_the_ranks_are_those_of_train() -> None:
    assert CPU_RANKS == supervisor.CPU_RANKS


def test_what_is_looked_at(tmp_path: Path) -> None:
    assert [check.name for check in machine.list_machine_checks(None, None, check_recipe)] == WITHOUT_RECIPE
    config = tiny.load(tmp_path, f"data.cache={tmp_path}")
    more = {check.name for check in machine.list_machine_checks(config, None, check_recipe)} - set(WITHOUT_RECIPE)
    assert more == {"data.cache", "recipe", "tokenizer", "data", "Hub", "W&B"}


@pytest.mark.slow
def test_a_recipe_is_looked_at_whole_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(child, "PYTHON", [str(preloaded.programs() / "python"), "-P"])
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    words = tiny.words(tmp_path, "tokenizer=/no/such/folder", "tokenizer.vocab_size=null")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as left:
        cli.main(["doctor", "quickstart", *words, "--json", "--ranks", "1"])
    found = {line["check"]: line for line in json.loads(capsys.readouterr().out)["findings"]}
    assert left.value.code == 1
    assert [name for name, line in found.items() if line["status"] == "fault"] == ["tokenizer"]
    assert found["settings"]["saw"] == "CUDA_LAUNCH_BLOCKING=1: every kernel waits for the one before"
    assert found["memory"]["saw"].startswith("1 ranks take about ")
    assert found["data"]["status"] == "ok"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_where_torch_is_broken_everything_else_is_still_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken" / "torch").mkdir(parents=True)
    (tmp_path / "broken" / "torch" / "__init__.py").write_text("raise ImportError('libcudnn.so.9: no such file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    words = [sys.executable, "-m", "smoltrain", "doctor", "quickstart", *tiny.words(tmp_path), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=200)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    found = {line["check"]: line for line in json.loads(done.stdout)["findings"]}
    assert "ImportError: libcudnn.so.9: no such file" in found["torch"]["saw"]
    assert [name for name, line in found.items() if line["status"] == "fault"] == ["torch", "all-reduce"]
    assert found["runs"]["status"] != "fault"
    assert found["data"]["status"] == "ok"


def test_a_recipe_with_mistakes_is_no_finding(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["doctor", "quickstart", "model.hiden_size=3"])
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("error: unknown key model.hiden_size")
