"""What a model copies: the same on any number of ranks and under any ZeRO stage; near 1 of one that knows its text."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from smoltrain.config.schema import Config
from smoltrain.evaluation.memorisation_report import describe_run_memorisation
from tests import launches, tiny
from tests.engine.test_engine import loader_of
from tests.ranks import world
from tests.sessions import bare_session
from tests.training.test_step import engine_for, prepared

WORDS = (
    "king", "queen", "night", "sword", "love", "fair", "heart", "crown", "ghost", "grave", "noble", "sweet", "thou",
    "shall", "speak", "never", "would", "heaven", "father", "daughter",
)  # fmt: skip


def measure(settings: Config) -> Any:
    from smoltrain.training.memorise import measure_memorisation

    wrapped, here = engine_for(settings, "fp32"), world()
    loader = loader_of(settings, here.rank, here.size)
    state = torch.get_rng_state()
    found = measure_memorisation(bare_session(settings, wrapped, loader))
    assert measure_memorisation(bare_session(settings, wrapped, loader, stop=lambda: here.rank == 1)) is None
    assert torch.equal(state, torch.get_rng_state()), "the training's random numbers are left alone"
    assert wrapped.module.training
    return found


def test_every_rank_counts_the_same_even_with_partitioned_weights(tmp_path: Path, ranks: Any) -> None:
    found = []
    for stage in (2, 3):
        words = ("engine.precision=fp32", "batch.sequence_length=32")
        found += ranks(2).run(measure, prepared(tmp_path, f"engine.ds_config=zero{stage}", *words))
    assert all(counts == found[0] for counts in found)
    held_out = found[0].counts["held_out_share"][0]
    assert 0 < held_out.num_known < held_out.num_ngrams, "this corpus repeats its sentences"
    for kind in ("share", "recalled_share"):
        assert found[0].counts[kind][0].share < 0.01, "a fresh model copies nothing"


def write_words(path: Path, seed: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    draw = random.Random(seed)
    path.write_text(" ".join(draw.choice(WORDS) for _ in range(300)), encoding="utf-8")
    return path


@pytest.mark.slow
def test_a_run_that_knows_its_text_by_heart_is_told_by_its_own_metrics_and_by_the_verb(tmp_path: Path) -> None:
    train = write_words(tmp_path / "train" / "text.txt", 0)
    held_out = write_words(tmp_path / "held-out" / "text.txt", 2)
    words = tiny.words(
        tmp_path, f"data.path={train}", f"data.validation_path={held_out}", "model.hidden_size=64",
        "model.intermediate_size=128", "batch.sequence_length=64", "batch.micro_batch=8", "batch.accumulation=1",
        "phases.main.steps=300", "phases.main.lr=1e-2", "phases.main.final_lr=1e-3", "phases.continuation.steps=1",
        "engine.gradient_checkpointing=none", "engine.precision=fp32", "evaluate.memorisation_every=100",
        "checkpoint.every=0", "evaluate.every=0", "sample.every=0", "track.gradients_every=0",
    )  # fmt: skip
    log = tmp_path / "log"
    assert launches.run("python", words, log) == 0, log.read_text()
    run = tmp_path / "runs" / "quickstart"
    lines = [line for line in launches.metrics(run) if "memorisation/share_of_13_grams" in line]
    assert [line["step"] for line in lines] == [100, 200, 300, 301]
    last = lines[-1]
    assert last["memorisation/recalled_share_of_13_grams"] > 0.9
    assert last["memorisation/recalled_share_of_50_grams"] > 0.9
    assert last["memorisation/held_out_share_of_13_grams"] < 0.05
    assert last["speed/memorisation_s"] > 0
    said = log.read_text()
    assert "memorisation at step 300: in the training tokens stand of the 13-grams " in said
    assert said.count("WARNING: the model copies its training text: ") == 1
    known = describe_run_memorisation(str(run), 301, 32).splitlines()
    assert float(known[2].split()[4].rstrip("%")) > 90, known  # of 13-grams, after training prompts
