"""Minutes that compiling saves against minutes that it takes."""

import math
from typing import Literal

import pytest

from smoltrain.kernels.compile_gain import GAINS, weigh_compiling


@pytest.mark.parametrize(("device", "flop", "on", "reason"), [
    ("cpu", 1.8e13, False, "auto: would save about 0.1 of 1.0 minutes of two CPU cores, and cost 0.5"),
    ("cpu", 1.8e14, True, "auto: saves about 1.1 of 10.0 minutes of two CPU cores, costs 0.5"),
    ("cuda", 1.8e14, False, "auto: would save about 0.0 of 0.0 minutes of an H100, and cost 0.5"),
    ("cuda", 2e19, True, "auto: saves about 352.3 of 1,174.4 minutes of an H100, costs 0.5"),
    ("cuda", math.inf, True, "auto: the length of the plan, not known yet, is taken to be worth it"),
])  # fmt: skip
def test_it_is_for_runs_that_get_back_more_than_it_takes(device: str, flop: float, on: bool, reason: str) -> None:
    assert weigh_compiling(device, flop) == (on, reason)


@pytest.mark.parametrize("device", GAINS)
@pytest.mark.parametrize("region", ["block", "model"])
def test_it_pays_from_where_both_are_equal(device: str, region: Literal["block", "model"]) -> None:
    gain = GAINS[device]
    even_s = gain.cost_minutes[region] * 60 / gain.saved_share
    assert not weigh_compiling(device, 0.99 * even_s * gain.flop_per_s, region).on
    assert weigh_compiling(device, 1.01 * even_s * gain.flop_per_s, region).on
