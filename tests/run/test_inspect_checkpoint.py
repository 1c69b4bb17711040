"""A checkpoint of every stage of ZeRO and of each optimizer; its loss in fp32. The rest: test_verify.py."""

import math
from pathlib import Path
from typing import Any

import pytest

from smoltrain.checkpoint.identity import RunIdentity
from smoltrain.checkpoint.manifest import step_folder
from smoltrain.checkpoint.saver import CheckpointSaver
from smoltrain.config.schema import CheckpointSection, Config
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.engine.reshard import OPTIMIZER_KEYS
from smoltrain.errors import DONE
from smoltrain.run.inspect_checkpoint import inspect_checkpoint, open_run_reference
from smoltrain.schedule import Plan
from tests import tiny
from tests.engine.test_engine import fresh_model, loader_of
from tests.ranks import world
from tests.run.test_verify import reseal, rewrite, shard_of, step_8
from tests.sessions import bare_session, train_steps
from tests.tiny import enter_run_folder


@pytest.mark.slow
def test_the_loss_is_that_of_the_run_in_fp32_too_and_with_a_document_mask(tmp_path: Path):
    more = ("engine.precision=fp32", "engine.ds_config=zero0", "packing.document_mask=true", "model.dropout=0.3")
    done = tiny.train(tmp_path, "run.stop_after=main", *more)
    assert done.returncode == DONE, done.stderr
    opened = open_run_reference(tmp_path / "runs" / "quickstart", needs_data=True)
    words, faults = inspect_checkpoint(opened, step_8(opened.folder), forward=True)
    assert not faults
    assert "in fp32 the order of additions moves a loss by less than 1e-06 of itself" in words


def save_one(settings: Config, precision: str, wandb_id: str, identity: RunIdentity) -> None:
    """On every rank: one step and its checkpoint."""
    from smoltrain.engine.build_engine import build_engine

    here, plan, accumulation = world(), Plan(settings.phases), 4 // world().size
    wrapped = build_engine(fresh_model(settings), settings, here, precision=precision, accumulation=accumulation)
    loader = loader_of(settings, here.rank, here.size, accumulation)
    train_steps(range(1, 2), bare_session(settings, wrapped, loader))
    saver = CheckpointSaver(settings.run_folder / "checkpoints", here, plan, CheckpointSection(), say=lambda _: None)
    saver.start_save(
        1, wrapped, loader, precision=precision, skipped_updates=0, wandb_id=wandb_id, identity=identity,
        validation_loss=None, validation_rows=8,
    )  # fmt: skip
    saver.finish()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize(("stage", "size"), [(0, 1), (1, 2), (2, 2), (3, 2)])
def test_every_stage_is_looked_into(tmp_path: Path, ranks: Any, stage: int, size: int, kind: str):
    precision = "fp32" if stage == 0 else "bf16"
    options = (
        f"optimizer.kind={kind}",
        f"engine.ds_config=zero{stage}",
        f"engine.precision={precision}",
        "batch.accumulation=4",
    )
    settings = tiny.load(tmp_path, *options, *(("batch.accumulation=2",) if size == 2 else ()))
    prepare_run_data(settings)
    entered = enter_run_folder(settings, size, 0)
    ranks(size).run(save_one, settings, precision, entered.wandb_id, entered.identity)
    run = open_run_reference(settings.run_folder, needs_data=False)
    at = step_folder(settings.run_folder / "checkpoints", 1)
    words, faults = inspect_checkpoint(run, at)
    assert not faults
    assert f"28,832 parameters by {'one rank' if size == 1 else '2 ranks'} are finite, 8 rows" in words
    if stage == 0:
        rewrite(at / "deepspeed" / "mp_rank_00_model_states.pt", lambda t: t["optimizer"]["state"].pop(3))
        if kind == "muon":
            want = "momentum_buffer has 17,408 elements, not 18,432"
        else:
            want = "exp_avg has 28,320 elements, not 28,832"
    else:
        adamw = OPTIMIZER_KEYS[stage == 3]
        rewrite(shard_of(at, 1), lambda t: t["optimizer_state_dict"][adamw]["state"][1]["exp_avg"].fill_(math.inf))
        second_group = "embed_tokens.weight" if kind == "muon" else "norm.weight"
        want = f"exp_avg of {second_group} is not finite"
    reseal(at)
    _, faults = inspect_checkpoint(run, at)
    assert any(want in fault for fault in faults), faults
