"""What a run leaves to the machine, and the words in which it is told."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from smoltrain.config.schema import Config
from smoltrain.distributed.world import World
from smoltrain.training.resolve_auto import choose_computing, choose_run_reduction, resolve_auto_settings
from tests import tiny
from tests.ranks import world


def told(settings: Config, bytes_there: int | None = None) -> tuple[dict[str, str], Any]:
    """(what is told, how the model computes) on a machine of so much memory; runs on every rank."""
    with pytest.MonkeyPatch.context() as patch:
        if bytes_there:
            patch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=bytes_there))
        chosen = resolve_auto_settings(settings, world(), settings.batch.rows(1))
    return chosen.reasons, chosen.computing.gradient_checkpointing


def test_every_choice_comes_with_its_reason(tmp_path: Path, ranks: Any) -> None:
    settings = tiny.load(tmp_path, "engine.attention=sdpa", "engine.loss=plain", "engine.compile=off")
    [(reasons, recompute)] = ranks(1).run(told, settings)
    assert reasons == {
        "precision": "bf16, as the recipe asks",
        "attention kernel": "sdpa, engine.attention is sdpa",
        "loss kernel": "plain, engine.loss is plain",
        "torch.compile": "off, as engine.compile asks",
        "micro-batch": "2 rows, as the recipe asks",
        "gradient checkpointing": "full, as the recipe asks",
    }
    assert recompute == "full"


@pytest.mark.parametrize(("gib", "mode"), [(64, "none"), (1e-3, "full")])
def test_auto_recomputes_the_least_that_fits(tmp_path: Path, ranks: Any, gib: float, mode: str) -> None:
    settings = tiny.load(tmp_path, "engine.gradient_checkpointing=auto")
    for reasons, recompute in ranks(1).run(told, settings, int(gib * 2**30)):
        assert recompute == mode
        assert reasons["gradient checkpointing"].startswith(f"{mode}, auto: the least that is estimated to fit")


@pytest.mark.parametrize(("gib", "rows"), [(64, 8), (1e-3, 1)])
def test_an_auto_micro_batch_is_what_fits(tmp_path: Path, ranks: Any, gib: float, rows: int) -> None:
    settings = tiny.load(tmp_path, "batch.micro_batch=auto", "batch.rows_per_step=8", "batch.accumulation=null")
    for reasons, _ in ranks(1).run(told, settings, int(gib * 2**30)):
        what = f"{rows} rows" if rows > 1 else "1 row"
        assert reasons["micro-batch"] == f"{what}, auto: what keeps a device busy and is estimated to fit"


@pytest.mark.parametrize(("gib", "once"), [(64, True), (8, False)])
def test_a_gpu_reduces_once_a_step_where_the_estimate_has_room(tmp_path: Path, gib: float, once: bool) -> None:
    """The rule itself asks for no GPU. More parameters than a bucket of DeepSpeed has, on many ranks."""
    shape = ("model.hidden_size=2048", "model.intermediate_size=8192", "model.num_hidden_layers=24")
    settings = tiny.load(tmp_path, *shape, "batch.micro_batch=1")
    many = World(0, 64, 0, 1, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=int(gib * 2**30)))
        settled = choose_computing(settings, torch.device("cpu"), settings.batch.rows(64))
        choice = choose_run_reduction(settled, "cuda", many, settings.batch.rows(64))
    assert choice.once_per_step == once
    assert choice.reason.startswith("auto: ")


def test_a_rank_that_has_fewer_rows_than_a_micro_batch_takes_these_and_says_so(tmp_path: Path) -> None:
    settings = tiny.load(tmp_path, "batch.micro_batch=4", "batch.rows_per_step=2", "batch.accumulation=null")
    chosen = resolve_auto_settings(settings, World(0, 1, 0, 1, torch.device("cpu")), 2)
    assert chosen.config.batch.micro_batch == 2
    assert chosen.reasons["micro-batch"] == "2 rows, all that a rank has of a step; batch.micro_batch=4 would be more"


def test_a_model_of_transformers_is_not_compiled_and_makes_its_own_logits(tmp_path: Path) -> None:
    shape = (
        "{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 2, intermediate_size: 64}"
    )
    kind = [
        f"model={{kind: transformers, model_type: llama, vocab_size: 320, max_position_embeddings: 64, "
        f"config: {shape}}}"
    ]
    alone = World(0, 1, 0, 1, torch.device("cpu"))
    chosen = resolve_auto_settings(tiny.load(tmp_path, *kind), alone, 2)
    assert chosen.reasons["torch.compile"] == "off, a model of transformers runs as it is written"
    assert chosen.reasons["loss kernel"] == "plain, a model of transformers makes its logits itself"
    assert chosen.reasons["attention kernel"].startswith("sdpa, ")
