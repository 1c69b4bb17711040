"""Bad gradients and discarded ones, whoever reduces: DeepSpeed by each of its optimizers, or OncePerStep."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from smoltrain.config.schema import Config
from smoltrain.data.rows.batch import Batch
from tests import tiny
from tests.engines import ROWS, Odd, T, V, refuse
from tests.ranks import world

WAYS = [  # stage, precision, engine.reduce_gradients, the class that takes the steps
    (0, "fp32", "auto", "PlainSteps"),
    (1, "fp32", "micro_batch", "ZeroSteps"),
    (1, "fp32", "step", "OncePerStep"),
    (1, "bf16", "auto", "DeepSpeedSteps"),
    (2, "fp32", "micro_batch", "ZeroSteps"),
    (2, "fp32", "step", "OncePerStep"),
    (2, "bf16", "micro_batch", "ZeroSteps"),
    (2, "bf16", "step", "OncePerStep"),
    (3, "fp32", "auto", "Zero3Steps"),
    (3, "bf16", "auto", "Zero3Steps"),
]
each_way = pytest.mark.parametrize(("stage", "precision", "by", "name"), WAYS)


def settings_of(folder: Path, stage: int, precision: str, by: str) -> Config:
    words = (f"engine.ds_config=zero{stage}", f"engine.precision={precision}", f"engine.reduce_gradients={by}")
    return tiny.load(folder, *words, "batch.micro_batch=1", "track.gradients_every=0")


def engine_of(settings: Config) -> Any:
    from smoltrain.engine.build_engine import build_engine

    torch.manual_seed(1)
    accumulation = ROWS // world().size
    return build_engine(Odd(), settings, world(), precision=settings.engine.precision, accumulation=accumulation)


def backward(engine: Any, step: int, factor: float = 1.0) -> None:
    """All micro-batches of a step; `factor` is what the loss of this rank's last one is multiplied by."""
    here = world()
    ids = torch.randint(V, (ROWS, T + 1), generator=torch.Generator().manual_seed(step))
    rows = ids[here.rank :: here.size]
    for i, row in enumerate(rows):
        loss = engine.forward(Batch(row[None].int())) * (here.size / (ROWS * T))
        engine.backward(loss * factor if i == len(rows) - 1 else loss)


def numbers(engine: Any) -> dict[str, torch.Tensor]:
    return engine.weights(keep=True)


def is_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def one_rank_overflows(settings: Config, factor: float) -> dict[str, Any]:
    """A step whose gradient is not finite on rank 1, and a sound one after it."""
    engine = engine_of(settings)
    before = numbers(engine)
    backward(engine, 1, factor if world().rank == 1 else 1.0)
    applied = engine.update(lr=1e-2, weight_decay=0.1)
    norm, stayed = engine.grad_norm_before_clipping, is_same(numbers(engine), before)
    backward(engine, 2)
    applied_after = engine.update(lr=1e-2, weight_decay=0.1)
    after = numbers(engine)
    return {
        "class": type(engine._steps).__name__, "applied": applied, "norm": norm, "stayed": stayed,
        "applied after": applied_after, "norm after": engine.grad_norm_before_clipping,
        "moved": not is_same(after, before), "finite": all(bool(torch.isfinite(x).all()) for x in after.values()),
    }  # fmt: skip


@each_way
@pytest.mark.parametrize("factor", [math.inf, pytest.param(math.nan, marks=pytest.mark.slow)])
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(
    tmp_path: Path, ranks: Any, stage: int, precision: str, by: str, name: str, factor: float
) -> None:
    for seen in ranks(2).run(one_rank_overflows, settings_of(tmp_path, stage, precision, by), factor):
        assert seen["class"] == name
        assert not seen["applied"]
        assert seen["norm"] == math.inf
        assert seen["stayed"]
        assert seen["applied after"]
        assert math.isfinite(seen["norm after"])
        assert seen["moved"]
        assert seen["finite"]


def discard_between(settings: Config, discards: bool) -> tuple[bool, dict[str, torch.Tensor], float]:
    """(whether the discard moved nothing, weights, last norm) of steps 1 and 3; step 2 is discarded, or never was."""
    engine = engine_of(settings)
    backward(engine, 1)
    assert engine.update(lr=1e-2, weight_decay=0.1)
    stayed = True
    if discards:
        before = numbers(engine)
        backward(engine, 2)
        assert math.isfinite(refuse(engine))
        assert engine.grad_norm_before_clipping == math.inf
        stayed = is_same(numbers(engine), before)
    backward(engine, 3)
    assert engine.update(lr=1e-2, weight_decay=0.1)
    return stayed, numbers(engine), engine.grad_norm_before_clipping


@each_way
def test_a_discarded_step_leaves_no_trace(
    tmp_path: Path, ranks: Any, stage: int, precision: str, by: str, name: str
) -> None:
    """As of a spike: its gradient is finite, so nothing but the discard keeps it from the weights."""
    settings = settings_of(tmp_path, stage, precision, by)
    without = ranks(2).run(discard_between, settings, False)
    with_one = ranks(2).run(discard_between, settings, True)
    for (_, expected, expected_norm), (stayed, weights, norm) in zip(without, with_one, strict=True):
        assert stayed
        assert norm == expected_norm
        assert is_same(weights, expected)


def squared_norms(settings: Config) -> tuple[float, float, float, bool]:
    """(sum of what `reduce` gave, the norm of the gradients, the norm of `update`, whether weights are the same)."""
    alone, here = engine_of(settings), world()
    backward(alone, 1)
    assert alone.update(lr=1e-2, weight_decay=0.1)
    engine = engine_of(settings)
    backward(engine, 1)
    squared = here.gather_numbers(engine.reduce().view(1)).sum()
    whole = math.sqrt(sum(float(gradient.double().square().sum()) for _, gradient in engine.gradients()))
    outcome = engine.start_update(lr=1e-2, weight_decay=0.1, squared_norm=squared)
    assert outcome.applied
    engine.finish_update(True, float(outcome.gradient_norm))
    return float(squared), whole, engine.grad_norm_before_clipping, is_same(numbers(engine), numbers(alone))


@each_way
def test_a_loop_may_reduce_first_and_add_the_norm_up_itself(
    tmp_path: Path, ranks: Any, stage: int, precision: str, by: str, name: str
) -> None:
    for squared, whole, norm, same in ranks(2).run(squared_norms, settings_of(tmp_path, stage, precision, by)):
        assert norm == pytest.approx(whole, rel=1e-5)
        assert same
        assert math.sqrt(squared) == pytest.approx(norm if name == "OncePerStep" else 0.0, rel=1e-14)


def skips_by_config(settings: Config) -> bool:
    engine = engine_of(settings)
    backward(engine, 1, math.inf)
    return engine.update(lr=1e-2, weight_decay=0.1)


def test_no_config_file_lets_a_bad_gradient_through(tmp_path: Path, ranks: Any) -> None:
    import json

    from smoltrain.config.load import DS_CONFIGS_FOLDER

    tree = json.loads((DS_CONFIGS_FOLDER / "zero2.json").read_text())
    tree["bf16"] = {"enabled": "auto", "check_grad_overflow": False}
    path = tmp_path / "lax.json"
    path.write_text(json.dumps(tree))
    words = (f"engine.ds_config={path}", "engine.precision=bf16", "engine.reduce_gradients=micro_batch")
    settings = tiny.load(tmp_path, *words, "batch.micro_batch=1", "track.gradients_every=0")
    assert ranks(1).run(skips_by_config, settings) == [False]


def looks_at_each_tensor(settings: Config) -> int:
    """How often DeepSpeed asks each gradient tensor whether it is finite, in a sound update and in a discard."""
    engine = engine_of(settings)
    looks = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(engine._deepspeed.optimizer), "_has_inf_or_nan", lambda *_: looks.append(1) or torch.zeros(1)
        )
        for step in (1, 2):
            backward(engine, step)
            if step == 1:
                assert engine.update(lr=1e-2, weight_decay=0.1)
            else:
                refuse(engine)
    return len(looks)


@pytest.mark.parametrize(("precision", "by"), [("bf16", "micro_batch"), ("fp32", "micro_batch"), ("fp16", "auto")])
def test_the_norm_alone_tells_whether_a_gradient_is_finite(tmp_path: Path, ranks: Any, precision: str, by: str) -> None:
    """Two operations a tensor less. In fp16 DeepSpeed looks for itself, as its loss scale depends on it."""
    [num_looks] = ranks(1).run(looks_at_each_tensor, settings_of(tmp_path, 2, precision, by))
    assert (num_looks > 0) == (precision == "fp16")


def fp16_norm(settings: Config) -> tuple[float, float]:
    """(loss scale, the norm of a step's gradient)."""
    engine = engine_of(settings)
    backward(engine, 1)
    assert engine.update(lr=0.0, weight_decay=0.0)
    return engine.loss_scale, engine.grad_norm_before_clipping


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_loss_scale_of_fp16_is_in_no_number_that_is_seen(tmp_path: Path, ranks: Any, stage: int) -> None:
    [(_, expected)] = ranks(1).run(fp16_norm, settings_of(tmp_path, 2, "fp32", "auto"))
    [(scale, norm)] = ranks(1).run(fp16_norm, settings_of(tmp_path, stage, "fp16", "auto"))
    assert scale > 1
    assert norm == pytest.approx(expected, rel=1e-2)
