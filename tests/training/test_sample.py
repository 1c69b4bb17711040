"""Samples during training: the same on every rank, and no draw of the training's random numbers."""

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from smoltrain.config.load import load_config
from smoltrain.config.schema import Config
from smoltrain.training import sample
from tests.data.tokenizers.test_encode_pieces import OTHERS
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


@pytest.mark.parametrize("kind", OTHERS)
def test_a_sample_begins_with_the_space_behind_its_prompt(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = OTHERS[kind]
    config = load_config("quickstart", ["sample.prompts=[to be]"])
    written = tokenizer.encode("to be or not")[len(tokenizer.encode("to be")) :]
    monkeypatch.setattr(sample, "generate_ids", lambda *_, **__: iter(written))
    session = SimpleNamespace(
        config=config, loader=SimpleNamespace(prepared=SimpleNamespace(tokenizer=tokenizer)), stop_ids=[],
        engine=SimpleNamespace(module=None, evaluation_mode=contextlib.nullcontext),
        watchdog=SimpleNamespace(mark=lambda _: None), is_any_to_stop=lambda: False,
    )  # fmt: skip
    assert sample.sample_prompts(cast(Any, session)) == [("to be", " or not")]
