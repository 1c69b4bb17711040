"""The whole of a run that meets a bad document: it goes back, goes on without it, and ends as if it had never been."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from smoltrain.run.run_folder import SPIKES_FILE
from smoltrain.training.spikes import read_spikes
from tests import tiny

pytestmark = pytest.mark.slow
POISON = "07-poison.txt"  # on the training side
MARK = "\N{SKULL AND CROSSBONES}"  # of bytes that no other document has
PLAN = (
    "phases.main.steps=60", "phases.continuation.steps=4", "checkpoint.every=10", "evaluate.rows=32", "sample.every=0",
    "model.dropout=0.1", "engine.precision=fp32", "spikes.on_spike=rewind", "spikes.history=16", "spikes.deviations=4",
)  # fmt: skip
NAN_AT, HIGH_AT = 35, 58  # the steps that first meet the poison, with the seeds below
NAN, HIGH = "run.seed=3", "run.seed=12"
MUON = "optimizer.kind=muon"  # whose tables and vectors are AdamW's
# One rank, with what a bad document would do to the forward of a larger model: no number for those micro-batches that
# hold it. "killed" dies in the moment between the journal and the restart. "masked" has the optimizer that a GPU has,
# whose update is masked; "late" too, and it reads of each update when the next step is under way, as on a GPU.
CHILD = """
import math, os, sys, torch
from smoltrain.launch import rank
from smoltrain.config.load import load_config
from smoltrain.data.tokens.load_prepared import load_prepared_data
from smoltrain.engine.engine import Engine
from smoltrain.training.spikes import Rewind
from smoltrain.engine.muon import Muon
from smoltrain.training import open_session
kind, mark, *words = sys.argv[1:]
kind = kind.split()
forward, ids = Engine.forward, []

def poisoned(self, batch):
    if not ids:
        ids.append(torch.tensor(load_prepared_data(load_config(words[0], words[1:])).tokenizer.encode(mark)))
    return forward(self, batch) * (math.nan if torch.isin(batch.ids_BT, ids[0]).any() else 1.0)

if "clean" not in kind:
    Engine.forward = poisoned
if "killed" in kind:
    Rewind.__init__ = lambda *_: os._exit(9)
if "masked" in kind or "late" in kind:
    build = Muon.build
    Muon.build = lambda self, groups, section, device: build(self, groups, section, torch.device("cuda"))
if "late" in kind:
    Session = open_session.Session
    open_session.Session = lambda *parts, **more: Session(*parts, **{**more, "reads_late": True})
code = rank.run_rank(words)
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
"""


def train(folder: Path, kind: str, *overrides: str, ranks: int = 1) -> tuple[int, str]:
    """The tiny run with a poisoned document in its data; exit code and all that it said."""
    foreign = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "SMOLTRAIN_", "WANDB_")
    own = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    words = tiny.words(folder, *PLAN, *overrides)
    glyphs = random.Random(3)
    text = "".join(chr(glyphs.randrange(0x4E00, 0x9FFF)) for _ in range(6))  # no model expects it
    marked = f"a plain line\nthen {MARK} and more of it\n"
    (folder / "corpus" / POISON).write_text(text if HIGH in overrides else marked, encoding="utf-8")
    script = folder / "child.py"
    script.write_text(CHILD, encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    done = subprocess.run(
        [*(launcher if ranks > 1 else [sys.executable]), str(script), kind, MARK, "quickstart", *words],
        capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=280, check=False, cwd=folder,
        env=own | {"OMP_NUM_THREADS": "1", "SMOLTRAIN_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def run_of(folder: Path) -> Path:
    return folder / "runs" / "quickstart"


def losses(folder: Path, name: str) -> list[float]:
    lines = map(json.loads, (run_of(folder) / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def assert_same(ours: Path, theirs: Path) -> None:
    """Bitwise: the rows, their losses, the weights."""
    assert (run_of(ours) / "ledger.bin").read_bytes() == (run_of(theirs) / "ledger.bin").read_bytes()
    for name in ("train/loss_nats_per_token", "validation/loss_nats_per_token", "data/ledger"):
        assert losses(ours, name) == losses(theirs, name)
    last = "checkpoints/step-00000064/model.safetensors"
    weights, others = load_file(run_of(ours) / last), load_file(run_of(theirs) / last)
    assert all(weight.equal(others[name]) for name, weight in weights.items())


@pytest.fixture(scope="module")
def rewound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that met a loss that is no number, and what it said."""
    folder = tmp_path_factory.mktemp("rewound")
    code, said = train(folder, "nan", NAN)
    assert code == 0, said
    return folder, said


def test_a_loss_that_is_no_number_costs_one_step_of_rows_and_names_the_document(rewound: tuple[Path, str]) -> None:
    folder, said = rewound
    (line,) = read_spikes(run_of(folder))
    assert (line["step"], line["does"], line["attempt"]) == (NAN_AT, "rewind", 1)
    assert math.isnan(line["loss"])
    assert f"the loss of step {NAN_AT} is nan on rank 0 (lr " in said
    assert f"{POISON} 'a plain line\\nthen {MARK}" in said
    assert "restored step 30 on 1 ranks" in said
    assert len(losses(folder, "train/loss_nats_per_token")) == 64
    assert losses(folder, "data/rows")[-1] == 65 * 4, "the guilty rows were spent, the plan was fulfilled"


def test_the_run_ends_as_if_the_rows_had_been_left_out_from_the_beginning(
    rewound: tuple[Path, str], tmp_path: Path
) -> None:
    folder, _ = rewound
    run_of(tmp_path).mkdir(parents=True)
    (run_of(tmp_path) / SPIKES_FILE).write_bytes((run_of(folder) / SPIKES_FILE).read_bytes())
    code, said = train(tmp_path, "clean", NAN)
    assert code == 0, said
    assert "rewind" not in said
    assert_same(folder, tmp_path)


def test_the_final_loss_is_that_of_a_run_that_saw_nothing_bad(rewound: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = rewound
    code, said = train(tmp_path, "clean", NAN)
    assert code == 0, said
    assert losses(tmp_path, "data/rows")[-1] == 64 * 4
    name = "validation/loss_nats_per_token"
    assert losses(folder, name)[-1] == pytest.approx(losses(tmp_path, name)[-1], rel=0.01)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_kill_once_the_journal_is_written_changes_nothing(
    rewound: tuple[Path, str], tmp_path: Path, ranks: int
) -> None:
    folder, _ = rewound
    code, said = train(tmp_path, "killed", NAN)
    assert code == 9, said
    assert len(read_spikes(run_of(tmp_path))) == 1
    code, said = train(tmp_path, "nan", NAN, ranks=ranks)
    assert code == 0, said
    assert len(read_spikes(run_of(tmp_path))) == 1, "the rows at these positions are passed over"
    if ranks == 1:
        assert_same(folder, tmp_path)
    else:  # other dropout and another order of sums, but the same rows
        assert (run_of(tmp_path) / "ledger.bin").read_bytes() == (run_of(folder) / "ledger.bin").read_bytes()


def test_a_host_that_reads_late_rewinds_is_killed_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """Each checkpoint is of a settled step, whatever is unread between two of them."""
    at_once = tmp_path / "at_once"
    late = tmp_path / "late"
    code, said = train(at_once, "masked nan", NAN, MUON)
    assert code == 0, said
    code, said = train(late, "late killed", NAN, MUON)
    assert code == 9, said
    code, said = train(late, "late nan", NAN, MUON)
    assert code == 0, said
    assert "restored step 30 on 1 ranks" in said
    assert_same(late, at_once)
    ours = read_spikes(run_of(late))
    theirs = read_spikes(run_of(at_once))
    for line in (*ours, *theirs):
        del line["time_s"]
    assert json.dumps(ours) == json.dumps(theirs)


def test_a_loss_far_above_the_others_is_met_in_the_same_way(tmp_path: Path) -> None:
    code, said = train(tmp_path / "bad", "clean", HIGH)
    assert code == 0, said
    (line,) = read_spikes(run_of(tmp_path / "bad"))
    assert line["step"] == HIGH_AT
    assert "robust deviations above" in line["why"]
    worst, *others = line["worst_first"]
    assert worst["passages"][0]["address"] == POISON
    assert worst["loss"] > max(row["loss"] for row in others) + 1
    assert POISON in said
    code, said = train(tmp_path / "careless", "clean", HIGH, "spikes.deviations=0")
    assert code == 0, said
    name = "validation/loss_nats_per_token"
    assert losses(tmp_path / "bad", name)[-1] == pytest.approx(losses(tmp_path / "careless", name)[-1], rel=0.01)
