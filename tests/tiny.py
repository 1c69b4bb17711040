"""A run so small that it trains in seconds: a real recipe, a real tokenizer, a real text, few of each."""

import os
import subprocess
from pathlib import Path

import pytest

from smoltrain.checkpoint.identity import RunIdentity
from smoltrain.checkpoint.manifest import Manifest
from smoltrain.config.load import load_config
from smoltrain.config.schema import Config
from smoltrain.run.run_folder import RunFolder, make_run_record, write_run_folder
from tests import preloaded

LINES = (
    "the king of {0} spoke to the queen of {1}",
    "and {1} went to {0} by night",
    "what news from {0}, my lord of {1}?",
)
PLACES = ("Naples", "Milan", "Verona", "Venice", "Padua", "Messina", "Athens", "Ephesus", "Tyre", "Rome", "Elsinore")

OVERRIDES = (
    "model.vocab_size=320",
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "model.intermediate_size=64",
    "model.max_position_embeddings=64",
    "model.tie_word_embeddings=true",
    "tokenizer.vocab_size=320",
    "data.package=null",
    "data.pattern=**/*",
    "data.validation_share=0.2",
    "batch.sequence_length=16",
    "batch.micro_batch=2",
    "batch.accumulation=2",
    "engine.precision=bf16",
    "engine.gradient_checkpointing=full",
    "optimizer.kind=adamw",
    "optimizer.momentum=0.95",
    "generation.max_tokens=8",
    "phases.main.steps=8",
    "phases.main.schedule=cosine",
    "phases.main.weight_decay=0.1",
    "phases.main.warmup_steps=2",
    "phases.main.lr=3e-3",
    "phases.main.final_lr=5e-4",
    "phases.continuation.lr=3e-4",
    "phases.continuation.steps=4",
    "phases.continuation.schedule=linear",
    "phases.continuation.weight_decay=0.02",
    "evaluate.every=4",
    "evaluate.rows=8",
    "sample.every=6",
    "checkpoint.every=3",
    "track.print_every=2",
    "track.gradients_every=4",
    "track.wandb=off",
)

STEP_NUMBERS = {  # as a step logs them
    "train/loss_nats_per_token": 2.34567,
    "train/lr": 0.0005,
    "train/grad_norm_before_clipping": 1.5,
    "speed/tokens_per_s": 12345.6,
    "speed/step_s": 1.0,
    "speed/data_wait_share": 0.0123,
    "memory/peak_gib": 3.14159,
}


def text(folder: Path) -> Path:
    """A folder of a dozen small documents."""
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for i, first in enumerate(PLACES):
        body = "\n".join(line.format(first, second) for second in PLACES for line in LINES)
        (corpus / f"{i:02d}-{first.lower()}.txt").write_text(body + "\n", encoding="utf-8")
    return corpus


def words(folder: Path, *overrides: str) -> list[str]:
    """Overrides of quickstart that make a tiny run in `folder`."""
    return [*OVERRIDES, f"data.path={text(folder)}", f"run.folder={folder / 'runs'}", *overrides]


def load(folder: Path, *overrides: str) -> Config:
    """The config of a tiny run in `folder`."""
    return load_config("quickstart", words(folder, *overrides))


def forget_wandb(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on this is a user who has never heard of W&B, whose home is this folder."""
    for name in [name for name in os.environ if name.startswith(("WANDB", "NETRC"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)


def train(folder: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The tiny run as one plain `python launch/train.py`, its output through pipes, no launcher, no W&B settings."""
    foreign = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "SMOLTRAIN_", "WANDB_")
    own = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    script = Path(__file__).parent.parent / "launch" / "train.py"
    line = [preloaded.programs() / "python", str(script), "quickstart", *words(folder, *overrides)]
    return subprocess.run(
        line, capture_output=True, text=True,
        encoding="utf-8", errors="replace", timeout=240, check=False, cwd=folder,
        env=own | {"OMP_NUM_THREADS": "1", "SMOLTRAIN_THREADS": "1"} | environment,
    )  # fmt: skip


def run_folder(path: Path) -> RunFolder:
    """A run's folder for a tracker of our own, without a run."""
    identity = RunIdentity(run_id="", rows_per_step=4, values={}, phases=[])
    return RunFolder(path, 4, "12345678", identity)


def enter_run_folder(
    config: Config, world_size: int, done: int, ancestor: Path | None = None, manifest: Manifest | None = None
) -> RunFolder:
    """Check and write a run's folder, as a start after `done` steps does."""
    return write_run_folder(config, world_size, make_run_record(config, world_size, done, ancestor, manifest))
