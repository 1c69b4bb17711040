"""Samples during training: the same on every rank, and no draw of the training's random numbers."""

from pathlib import Path
from typing import Any

import torch

from smoltrain.config.schema import Config
from tests.engine.test_engine import loader_of
from tests.ranks import world
from tests.sessions import bare_session
from tests.training.test_step import engine_for, prepared


def samples(settings: Config, stage: int) -> list[tuple[str, str]]:
    from smoltrain.training.sample import sample_prompts

    wrapped, here = engine_for(settings, "fp32"), world()
    assert wrapped.stage == stage
    state = torch.get_rng_state()
    loader = loader_of(settings, here.rank, here.size)
    texts = sample_prompts(bare_session(settings, wrapped, loader))
    assert sample_prompts(bare_session(settings, wrapped, loader, stop=lambda: here.rank == 1)) == []
    assert torch.equal(state, torch.get_rng_state()), "sampling must not touch the training's random numbers"
    assert wrapped.module.training
    return texts


def test_every_rank_samples_the_same_text_even_with_partitioned_weights(tmp_path: Path, ranks: Any) -> None:
    texts = []
    for stage in (2, 3):
        settings = prepared(tmp_path, f"engine.ds_config=zero{stage}", "engine.precision=fp32")
        texts += ranks(2).run(samples, settings, stage)
    assert all(text == texts[0] for text in texts)
    assert len(texts[0]) == 2
