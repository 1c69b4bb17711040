"""The cadence of checkpoints against published formulas, and against the lost time that it minimises."""

import dataclasses

import pytest

from smoltrain.estimate.failures import FailureCosts, choose_cadence, daly_interval, lost_share, young_interval

COSTS = FailureCosts(node_mtbf_s=8_000_000.0, pause_s=10.0, publish_s=0.0, restart_s=100.0)


def test_intervals_are_those_of_young_and_daly():
    assert young_interval(50, 10_000) == 1000
    # Daly's series: sqrt(2 * 50 * 10^4) * (1 + 0.05 / 3 + 0.0025 / 9) - 50.
    assert daly_interval(50, 10_000) == pytest.approx(1000 * (1 + 0.05 / 3 + 0.0025 / 9) - 50)
    assert daly_interval(20_000, 10_000) == 10_000, "a pause as long as that is no time to save more often"
    assert daly_interval(1e-6, 1e9) == pytest.approx(young_interval(1e-6, 1e9), rel=1e-4)


def test_a_cadence_is_what_hand_computes_and_loses_the_least():
    cadence = choose_cadence(100, COSTS)
    assert cadence.between_failures_s == 80_000
    assert cadence.every_s == daly_interval(10, 80_000)
    by_hand = 10 / (cadence.every_s + 10) + ((cadence.every_s + 10) / 2 + 100) / 80_000
    assert cadence.lost_share == pytest.approx(by_hand)
    for other in (0.5, 0.8, 1.25, 2.0):
        assert lost_share(other * cadence.every_s, 80_000, COSTS) > cadence.lost_share


def test_limits():
    assert choose_cadence(1, dataclasses.replace(COSTS, node_mtbf_s=1e18)).lost_share < 1e-6, "nothing fails"
    assert choose_cadence(10**6, COSTS).lost_share == 1.0, "a failure every 8 s leaves nothing"
    slow = dataclasses.replace(COSTS, publish_s=5000.0)
    assert choose_cadence(100, slow).every_s == 5000.0, "none begins before the one before is published"
    lost = [choose_cadence(nodes, COSTS).lost_share for nodes in (1, 8, 64, 512)]
    assert lost == sorted(lost)
