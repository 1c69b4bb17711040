"""What the peers' scripts really do: the rate of each step, and the validation loss of given weights."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks import contenders, launchers, peers
from benchmarks.real_rows import ROWS_FILE, VALIDATION_FILE, write_real_rows
from benchmarks.watching import TrainerRecord, watch_trainer
from smoltrain.config.schema import Config
from smoltrain.schedule import Plan
from tests import launches, tiny

STEPS, EVERY, WARMUP = 12, 4, 4
# Runs a peer's script and writes down the rate of each update; of litgpt also its validation loss, counted by hand.
OBSERVER = """
import json, os, runpy, sys
from torch.optim.optimizer import register_optimizer_step_pre_hook
script, out = sys.argv[1], sys.argv[3]
sys.argv = [script, *sys.argv[2:3]]
sys.path.insert(0, os.path.dirname(script))
def tell(**values):
    with open(out, "a") as file:
        file.write(json.dumps(values) + "\\n")
register_optimizer_step_pre_hook(lambda optimizer, *_: tell(lr=optimizer.param_groups[0]["lr"]))
if "litgpt" in script:
    import numpy, torch
    from litgpt import pretrain
    own = pretrain.validate
    def validate(fabric, model, *words, **named):
        loss = own(fabric, model, *words, **named)
        rows = torch.from_numpy(numpy.load(json.load(open(sys.argv[1]))["validation"])).long()
        with torch.no_grad():
            logits = model.eval()(rows[:, :-1])
        model.train()
        by_hand = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), rows[:, 1:].flatten())
        tell(by_hand=float(by_hand))
        return loss
    pretrain.validate = validate
runpy.run_path(script, run_name="__main__")
"""


def load(tmp_path: Path, *words: str) -> Config:
    """A tiny task whose rates are too small to move a weight, with micro-batches that leave rows over."""
    words = (
        *tiny.words(tmp_path), "engine.precision=fp32", f"phases.main.warmup_steps={WARMUP}", "phases.main.lr=2e-9",
        "phases.main.final_lr=2e-10", "evaluate.rows=7", *words,
    )  # fmt: skip
    return contenders.load_task("quickstart", words, STEPS, EVERY, tmp_path / "results")


def observe(tmp_path: Path, config: Config, name: str, python: Path, **task: object) -> tuple[list[dict], list[dict]]:
    """(what a peer's script told, what was seen of it)."""
    results = tmp_path / "results"
    write_real_rows(config, STEPS, config.batch.rows(1), results)
    peer = peers.PEERS[name]
    told, seen, file = tmp_path / "told.jsonl", tmp_path / "seen.jsonl", tmp_path / "task.json"
    own = {"lines": str(told), "folder": str(tmp_path / "out")}
    described = launchers.describe_peer_task(
        config, STEPS, 2, 2, results / ROWS_FILE, results / VALIDATION_FILE, EVERY
    )  # fmt: skip
    file.write_text(json.dumps(described | peers.describe_peer_model(peer, config.model) | own | task))
    environment = launches.environment() | {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    words = [python, "-c", OBSERVER, peers.HERE / peer.script, file, seen]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return read_lines(told), read_lines(seen)


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def validation_losses(lines: Sequence[dict]) -> list[float]:
    told = [line for line in lines if "validation/loss_nats_per_token" in line]
    assert [line["step"] for line in told] == [4, 8, 12]
    return [line["validation/loss_nats_per_token"] for line in told]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainerRecord, Path]:
    """A run of ours over the same task, and its weights as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("ours")
    config = load(folder)
    contender = contenders.make_our_contender(config, "adamw", STEPS, [2e-9], folder)
    command, lines, _ = contender.launch(2e-9)(folder / "runs")
    environment = launches.environment()
    record = watch_trainer(command, lines, STEPS, environment, folder / "log", cuda=False, evaluations=3)
    smoltrain = [str(Path(sys.executable).with_name("smoltrain")), "export", str(lines.parent)]
    subprocess.run([*smoltrain, str(folder / "weights")], env=environment, check=True, capture_output=True)
    return record, folder / "weights"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hf-trainer", "plain"])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_peer_has_our_rate_at_each_step_and_our_loss_of_our_weights(
    name: str, schedule: str, tmp_path: Path, ours: tuple[TrainerRecord, Path]
):
    config = load(tmp_path, f"phases.main.schedule={schedule}")
    told, seen = observe(tmp_path, config, name, Path(sys.executable), weights=str(ours[1]))
    plan = Plan(config.phases)
    assert [line["lr"] for line in seen] == pytest.approx([plan.lr(step) for step in range(1, STEPS + 1)], rel=1e-12)
    expected = [found.loss for found in ours[0].evaluations]
    assert validation_losses(told) == pytest.approx(expected, abs=2e-5)
    steps = [line["train/loss_nats_per_token"] for line in told if "train/loss_nats_per_token" in line]
    assert steps == pytest.approx(ours[0].losses, abs=2e-5), "the same rows in the same order"


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_litgpt_has_our_rates_but_for_its_own_count_of_micro_batches(schedule: str, tmp_path: Path):
    python = peers.find_peer_environment("litgpt") / "bin" / "python"
    if not python.is_file():
        pytest.skip("litgpt's environment is made by a benchmark, not by tests")
    words = ["phases.main.final_lr=0"] if schedule == "constant" else []
    config = load(tmp_path, f"phases.main.schedule={schedule}", *words)
    told, seen = observe(tmp_path, config, "litgpt", python)
    plan = Plan(config.phases)
    rates = [line["lr"] for line in seen if "lr" in line]
    ours = [plan.lr(step) for step in range(1, STEPS + 1)]
    if schedule == "linear":
        assert rates == pytest.approx(ours, rel=1e-12), "it has none of its own"
    else:
        for step in range(2, STEPS):
            near = sorted(ours[step - 2 : step + 1])
            assert near[0] <= rates[step - 1] <= near[-1], f"within a step of ours at step {step}"
        assert rates[0] == pytest.approx(ours[0] / 2), "half of the first step's micro-batches"
    by_hand = [line["by_hand"] for line in seen if "by_hand" in line]
    assert len(by_hand) == 4, "its check of itself at the start, and three evaluations"
    assert validation_losses(told) == pytest.approx(by_hand[1:], abs=2e-5)


@pytest.mark.slow
def test_no_validation_row_is_trained_on_and_none_fills_up(tmp_path: Path):
    config = load(tmp_path)
    digests = write_real_rows(config, STEPS, config.batch.rows(1), tmp_path / "results")
    rows = np.load(tmp_path / "results" / ROWS_FILE)
    held_out = np.load(tmp_path / "results" / VALIDATION_FILE)
    assert rows.shape == (STEPS * 4, 17)
    assert held_out.shape == (7, 17), "an odd number of rows, of micro-batches of two"
    assert not {row.tobytes() for row in rows} & {row.tobytes() for row in held_out}
    assert digests == write_real_rows(config, STEPS, config.batch.rows(1), tmp_path / "results")
    assert os.listdir(tmp_path / "results" / "tokens"), "tokenised once, for all runs"  # noqa: PTH208
