"""Settings that would fit: each does, by the estimate of the recipe under its overrides."""

import pytest

from smoltrain.config.load import load_config
from smoltrain.estimate.constants import GIB, GPUS, SPARE_SHARE
from smoltrain.estimate.fitting import build_fitted_setup
from smoltrain.estimate.memory import estimate_memory
from smoltrain.estimate.report import Estimate
from smoltrain.estimate.smaller_settings import SmallerSetting, find_smaller_settings

RECIPE = "smollm2-135m"
LARGE = ("batch.micro_batch=64", "batch.accumulation=2", "engine.gradient_checkpointing=none", "engine.loss=fused")
DEVICE = GPUS["l4"]


def find(words: tuple[str, ...], limit_gib: float, world: int = 2, beyond_gib: float = 0.0) -> list[SmallerSetting]:
    config = load_config(RECIPE, words)
    setup = build_fitted_setup(config, limit_gib * GIB, world, device="cuda")
    return find_smaller_settings(Estimate(setup, DEVICE), config, limit_gib * GIB, beyond_gib * GIB)


@pytest.mark.parametrize("beyond_gib", [0.0, 8.0])
def test_each_setting_fits_and_trains_on_the_same_rows(beyond_gib: float) -> None:
    settings = find(LARGE, 24, beyond_gib=beyond_gib)
    assert len(settings) == 3
    assert len({setting.overrides for setting in settings}) == 3
    for setting in settings:
        config = load_config(RECIPE, [*LARGE, *setting.overrides])
        setup = build_fitted_setup(config, 24 * GIB, 2, device="cuda")
        total = estimate_memory(setup).total + beyond_gib * GIB
        assert total == pytest.approx(setting.memory_bytes)
        assert total <= 24 * GIB * (1 - SPARE_SHARE) + 1
        assert setup.micro_batch * setup.accumulation == 128


def test_one_key_alone_is_named_before_two() -> None:
    keys = [{override.partition("=")[0] for override in setting.overrides} for setting in find(LARGE, 24)]
    assert {"batch.micro_batch", "batch.accumulation"} in keys
    assert {"engine.gradient_checkpointing"} in keys


def test_recomputing_costs_time_and_fewer_rows_at_once_hardly_any() -> None:
    by_key = {setting.overrides[0].partition("=")[0]: setting for setting in find(LARGE, 24)}
    assert by_key["engine.gradient_checkpointing"].more_time > 0.01
    assert abs(by_key["batch.micro_batch"].more_time) < 0.1
    assert str(by_key["engine.gradient_checkpointing"]).endswith("% time)")


def test_nothing_is_named_that_does_not_fit() -> None:
    assert find(LARGE, 1.5) == []


def test_whole_logits_are_given_up_first() -> None:
    settings = find((*LARGE, "engine.loss=plain"), 48)
    assert ("engine.loss=fused",) in [setting.overrides for setting in settings]
