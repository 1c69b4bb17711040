"""The verb: every check is there, a fault ends it with 1, and nothing is trained."""

import json
from pathlib import Path

import pytest

from smoltrain import cli
from smoltrain.doctor import child, machine
from smoltrain.doctor.needs import CPU_RANKS
from smoltrain.launch import supervisor
from tests import preloaded, tiny

WITHOUT_RECIPE = [
    "python", "packages", "torch", "CUDA", "NCCL", "flash-attn", "bf16", "threads", "CPU clocks", "GPU clocks",
    "neighbours", "settings", "launcher", "open files", "locked memory", "memory", "/dev/shm", "runs", "cache",
    "all-reduce", "NCCL all-reduce",
]  # fmt: skip


def test_the_ranks_are_those_of_train() -> None:
    assert CPU_RANKS == supervisor.CPU_RANKS


def test_what_is_looked_at(tmp_path: Path) -> None:
    assert [check.name for check in machine.list_machine_checks(None, None)] == WITHOUT_RECIPE
    config = tiny.load(tmp_path, f"data.cache={tmp_path}")
    more = {check.name for check in machine.list_machine_checks(config, None)} - set(WITHOUT_RECIPE)
    assert more == {"data.cache", "tokenizer", "data", "Hub", "W&B"}


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


def test_a_recipe_with_mistakes_is_no_finding(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["doctor", "quickstart", "model.hiden_size=3"])
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("error: unknown key model.hiden_size")
