"""DeepSpeed's files: what one world wrote under a ZeRO stage another reads under another, and training goes on."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from smoltrain.config.load import DS_CONFIGS_FOLDER
from smoltrain.config.schema import Config
from smoltrain.errors import DONE, STOPPED, UserError
from tests import launches, tiny
from tests.engines import engine_of, read_files, settings_of, train, whole_state, write_files


def write(settings: Config, folder: Path) -> tuple[dict[str, list[Any]], list[float]]:
    """Three steps, a checkpoint, and the losses of five more."""
    wrapped = engine_of(settings, seed=1)
    train(wrapped, 1, 3)
    write_files(wrapped, folder)
    return whole_state(wrapped), train(wrapped, 4, 8)


def read(settings: Config, folder: Path, stage: int, used: bool = False) -> tuple[dict[str, list[Any]], list[float]]:
    """What an engine, fresh or `used`, has after restoring what `stage` wrote, and the losses of five steps more."""
    wrapped = engine_of(settings, seed=2)
    if used:
        train(wrapped, 11, 12)
    read_files(wrapped, folder, stage)
    return whole_state(wrapped), train(wrapped, 4, 8)


def pass_on(settings: Config, came: Path, stage: int, went: Path) -> None:
    """Restore, and write again."""
    wrapped = engine_of(settings, seed=2)
    read_files(wrapped, came, stage)
    write_files(wrapped, went)


def assert_same(wrote: list[Any], found: list[Any], precision: str, tolerance: float | None = None) -> None:
    """The same state bit for bit, and then about the same losses."""
    if tolerance is None:
        tolerance = 1e-6 if precision == "fp32" else 1e-2
    expected, losses = wrote[0]
    assert expected["step"] == [3.0]
    assert losses[-1] < 0.999 * losses[0] or losses[-1] > 1.001 * losses[0], "else equal losses prove nothing"
    for state, losses_after in found:
        assert state == expected  # bitwise: these are lists of floats
        assert losses_after[0] == pytest.approx(losses[0], abs=1e-6)
        assert losses_after == pytest.approx(losses, abs=tolerance)


@pytest.mark.parametrize(
    ("stage", "precision", "by"),
    [
        *[(2, "bf16", "step"), (2, "bf16", "micro_batch")],
        *(
            pytest.param(*cell, marks=pytest.mark.slow)
            for cell in (
                (0, "fp32", "auto"),
                (1, "bf16", "auto"),
                (1, "fp32", "micro_batch"),
                (2, "fp32", "step"),
                (3, "bf16", "auto"),
            )
        ),
    ],
)
def test_two_ranks_and_one_read_each_other(tmp_path: Path, ranks: Any, stage: int, precision: str, by: str) -> None:
    settings = settings_of(tmp_path, stage, precision, by)
    for old, new in ((2, 1), (1, 2)):
        wrote = ranks(old).run(write, settings, tmp_path / f"{old}")
        assert_same(wrote, ranks(new).run(read, settings, tmp_path / f"{old}", stage), precision)


def make_older(folder: Path) -> tuple[dict[str, Any], type]:
    """Give the model's file what format 3 had there, though other weights; what two entries were. Runs on a rank."""
    [file] = (folder / "deepspeed").glob("*model_states.pt")
    tree = torch.load(file, weights_only=False)
    torch.save(tree | {"module": {"norm.weight": torch.zeros(3)}}, file)
    [shard] = (folder / "deepspeed").glob("*optim_states.pt")
    return tree["module"], type(torch.load(shard, weights_only=False)["optimizer_state_dict"]["zero_stage"])


def test_weights_are_read_from_model_safetensors_alone(tmp_path: Path, ranks: Any) -> None:
    settings = settings_of(tmp_path, 2, "bf16")
    wrote = ranks(1).run(write, settings, tmp_path / "old")
    assert ranks(1).run(make_older, tmp_path / "old") == [({}, int)], "not stored twice, and no enum"
    assert_same(wrote, ranks(1).run(read, settings, tmp_path / "old", 2), "bf16")


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")])
def test_every_world_reads_every_other(tmp_path: Path, ranks: Any, stage: int, precision: str) -> None:
    settings = settings_of(tmp_path, stage, precision)
    for old in (1, 2, 3, 4):
        wrote = ranks(old).run(write, settings, tmp_path / f"{old}")
        for new in (1, 2, 3, 4):
            assert_same(wrote, ranks(new).run(read, settings, tmp_path / f"{old}", stage), precision)


@pytest.mark.parametrize(
    "old_stage", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_every_sharding_stage_reads_every_other(tmp_path: Path, ranks: Any, old_stage: int, precision: str) -> None:
    wrote = ranks(2).run(write, settings_of(tmp_path, old_stage, precision), tmp_path / "old")
    for new_stage in {1, 2, 3} - {old_stage}:
        settings = settings_of(tmp_path, new_stage, precision)
        for size in (2, 1):
            assert_same(wrote, ranks(size).run(read, settings, tmp_path / "old", old_stage), precision)


@pytest.mark.parametrize(
    ("old_stage", "new_stage", "by"),
    [
        *[(2, 2, "step"), (2, 2, "micro_batch")],
        *(
            pytest.param(*cell, marks=pytest.mark.slow)
            for cell in ((1, 1, "auto"), (3, 3, "auto"), (3, 2, "step"), (3, 2, "micro_batch"))
        ),
    ],
)
def test_an_engine_that_has_trained_goes_back(
    tmp_path: Path, ranks: Any, old_stage: int, new_stage: int, by: str
) -> None:
    wrote = ranks(2).run(write, settings_of(tmp_path, old_stage, "bf16"), tmp_path / "old")
    settings = settings_of(tmp_path, new_stage, "bf16", by)
    assert_same(wrote, ranks(2).run(read, settings, tmp_path / "old", old_stage, True), "bf16")


@pytest.mark.parametrize(
    ("old_stage", "new_stage", "old", "new"), [(2, 2, "bf16", "fp32"), (3, 1, "fp32", "bf16"), (1, 3, "bf16", "fp32")]
)
def test_another_precision_makes_its_weights_of_the_same_masters(
    tmp_path: Path, ranks: Any, old_stage: int, new_stage: int, old: str, new: str
) -> None:
    wrote = ranks(2).run(write, settings_of(tmp_path, old_stage, old), tmp_path / "old")
    for found, losses in ranks(2).run(read, settings_of(tmp_path, new_stage, new), tmp_path / "old", old_stage):
        assert losses == pytest.approx(wrote[0][1], abs=1e-2)
        for name, expected in wrote[0][0].items():
            assert found[name][:3] == expected[:3]
            if name != "step":
                dtype = getattr(torch, {"bf16": "bfloat16", "fp32": "float32"}[new])
                assert found[name][3] == torch.tensor(expected[0]).to(dtype).tolist()


def with_zero(folder: Path, stage: int = 2, **options: Any) -> str:
    """A DeepSpeed config like zero2's or zero3's with other zero_optimization options."""
    tree = json.loads((DS_CONFIGS_FOLDER / f"zero{stage}.json").read_text())
    tree["zero_optimization"] |= options
    path = folder / f"odd-{stage}-{'-'.join(options)}.json"
    path.write_text(json.dumps(tree))
    return str(path)


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        (2, {"round_robin_gradients": True}),  # parameters in another order, which depends on the number of ranks
        pytest.param(2, {"parameter_alignment": True}, marks=pytest.mark.slow),  # gaps between parameters
        pytest.param(3, {"sub_group_size": 30}, marks=pytest.mark.slow),  # a parameter group in several tensors
    ],
)
def test_options_that_lay_the_state_out_in_another_way_may_come_and_go(
    tmp_path: Path, ranks: Any, stage: int, options: dict[str, Any]
) -> None:
    """Only engines without the options are asked: with the first one DeepSpeed gathers under the wrong names."""
    plain, odd = (settings_of(tmp_path, name, "bf16") for name in (stage, with_zero(tmp_path, stage, **options)))
    came = tmp_path / "plain"
    wrote = ranks(2).run(write, plain, came)
    for hop, size in enumerate((2, 2, 1, 2)):
        went = tmp_path / f"hop-{hop}"
        ranks(size).run(pass_on, odd, came, stage, went)
        assert_same(wrote, ranks(1).run(read, plain, went, stage), "bf16")
        came = went
    assert_same(wrote, ranks(2).run(read, settings_of(tmp_path, 5 - stage, "bf16"), came, stage), "bf16")


@pytest.mark.parametrize(("old_stage", "new_stage"), [(0, 2), (3, 0)])
def test_zero_0_neither_reads_the_others_nor_is_read(
    tmp_path: Path, ranks: Any, old_stage: int, new_stage: int
) -> None:
    ranks(1).run(write, settings_of(tmp_path, old_stage, "fp32"), tmp_path / "step-00000003")
    expected = f"step-00000003 is a checkpoint of another ZeRO stage: saw ZeRO-{new_stage}, want ZeRO-{old_stage}"
    with pytest.raises(UserError, match=expected):
        ranks(1).run(read, settings_of(tmp_path, new_stage, "fp32"), tmp_path / "step-00000003", old_stage)


def test_zero_0_keeps_its_precision(tmp_path: Path, ranks: Any) -> None:
    """In fp16 its masters are copies, and there is a loss scale."""
    ranks(1).run(write, settings_of(tmp_path, 0, "fp32"), tmp_path / "step-00000003")
    with pytest.raises(UserError, match="is a ZeRO-0 checkpoint of another precision: saw fp16, want fp32"):
        ranks(1).run(read, settings_of(tmp_path, 0, "fp16"), tmp_path / "step-00000003", 0)


# ---- the commands


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("kind", "tolerance"), [("adamw", 1e-4), ("muon", 1e-2)])  # see test_muon.py
def test_a_run_moves_from_two_ranks_to_one_and_back(tmp_path: Path, kind: str, tolerance: float) -> None:
    options = (
        f"optimizer.kind={kind}",
        "engine.precision=fp32",
        "phases.main.steps=60",
        "run.stop_after=main",
        "sample.every=0",
    )
    for folder in ("straight", "moved"):
        (tmp_path / folder).mkdir()
    straight, moved = tiny.words(tmp_path / "straight", *options), tiny.words(tmp_path / "moved", *options)
    log, runs = tmp_path / "moved" / "log", [tmp_path / name / "runs" / "quickstart" for name in ("straight", "moved")]
    assert launches.run("smoltrain", straight, tmp_path / "straight" / "log") == DONE
    for launcher, step in (("smoltrain", 10), ("python", 25)):
        process = launches.start(launcher, moved, log)
        launches.wait_for_step(runs[1], step, process)
        launches.interrupt(process)
        assert process.wait(60) == STOPPED
        launches.wait_until_gone(moved)
    assert launches.run("smoltrain", moved, log) == DONE
    first, second = re.findall(r"stopped after step (\d+)", log.read_text())
    assert f"restored step {first} on 1 ranks" in log.read_text()
    assert f"restored step {second} on 2 ranks" in log.read_text()
    losses, losses_moved = (launches.losses(run) for run in runs)
    assert losses_moved == pytest.approx(losses, abs=tolerance)
    ledgers = [[(m["step"], m["data/ledger"]) for m in launches.metrics(run) if "data/ledger" in m] for run in runs]
    assert ledgers[0] == ledgers[1], "the same rows in every step"
