"""Muon knows where its matrices lie, or refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from smoltrain.config.load import DS_CONFIGS_FOLDER
from smoltrain.config.schema import Config
from smoltrain.errors import UserError
from tests.engines import engine_of, settings_of, train

MUON = {"kind": "muon"}


def with_muon(settings: Config) -> Config:
    return settings.model_copy(update={"optimizer": settings.optimizer.model_copy(update=MUON)})


def trained(settings: Config) -> list[float]:
    return train(engine_of(settings, seed=1), 1, 6)


def with_zero(folder: Path, stage: int, **options: Any) -> str:
    tree = json.loads((DS_CONFIGS_FOLDER / f"zero{stage}.json").read_text())
    tree["zero_optimization"] |= options
    path = folder / f"odd-{stage}.json"
    path.write_text(json.dumps(tree))
    return str(path)


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        (2, {"round_robin_gradients": True}),  # parameters in another order, which depends on the number of ranks
        (2, {"parameter_alignment": True}),  # gaps between parameters
        (3, {"sub_group_size": 30}),  # a parameter group in several tensors
    ],
)
def test_however_deepspeed_lays_the_masters_out_the_update_is_the_same(
    tmp_path: Path, ranks: Any, stage: int, options: dict[str, Any]
) -> None:
    plain = with_muon(settings_of(tmp_path, stage, "fp32", "micro_batch" if stage == 2 else "auto"))
    odd = settings_of(tmp_path, with_zero(tmp_path, stage, **options), "fp32", "micro_batch" if stage == 2 else "auto")
    wanted = ranks(3).run(trained, plain)
    for losses, expected in zip(ranks(3).run(trained, with_muon(odd)), wanted, strict=True):
        assert losses == pytest.approx(expected, abs=1e-4)


def refusal(settings: Config) -> str:
    """What is said where names are dealt to the wrong places; runs on every rank."""
    from smoltrain.engine.deepspeed_private import deepspeed

    def swap_names(engine: Any) -> Any:
        groups = shapes(engine)
        return [dict(reversed(group.items())) for group in groups]

    engine_class = deepspeed.DeepSpeedEngine
    shapes = engine_class._get_zero_param_shapes
    engine_class._get_zero_param_shapes = swap_names
    try:
        engine_of(settings, seed=1)
    except UserError as error:
        return str(error)
    finally:
        engine_class._get_zero_param_shapes = shapes
    return ""


@pytest.mark.parametrize(
    ("stage", "precision"), [(1, "bf16"), (2, "fp32"), pytest.param(3, "bf16", marks=pytest.mark.slow)]
)
def test_masters_that_lie_elsewhere_are_refused(tmp_path: Path, ranks: Any, stage: int, precision: str) -> None:
    for said in ranks(2).run(refusal, with_muon(settings_of(tmp_path, stage, precision))):
        assert "muon does not know where its matrices lie" in said
        assert "optimizer.kind=adamw" in said
