"""Worlds in words, and how a recipe scales over links of which the answer is known."""

import dataclasses

import pytest

from smoltrain.config.load import load_config
from smoltrain.errors import UserError
from smoltrain.estimate.collectives import Link, Network
from smoltrain.estimate.constants import GPUS
from smoltrain.estimate.network import NetworkWish
from smoltrain.estimate.scaling import Scaling, ScalingPoint, estimate_scaling, failure_costs, parse_worlds
from smoltrain.estimate.speed import SpeedEstimate, communication_seconds
from tests.estimate.setups import SMOL, make_setup

GROWING = ("batch.rows_per_step=null", "batch.micro_batch=8", "batch.accumulation=2")
FIXED = ("batch.rows_per_step=96", "batch.micro_batch=4", "batch.accumulation=null")


def scale(*words: str, worlds: str, mtbf_hours: float = 6000.0, **wish: str) -> Scaling:
    config = load_config(SMOL, list(words))
    return estimate_scaling(config, parse_worlds(worlds), GPUS["h100"], NetworkWish(**wish), mtbf_hours)  # type: ignore


@pytest.mark.parametrize(("text", "worlds"), [
    ("8", [8]), ("8..64", [8, 16, 32, 64]), ("8..100", [8, 16, 32, 64, 100]), ("12,8,8", [8, 12]), ("3..3", [3]),
])  # fmt: skip
def test_worlds_in_words(text: str, worlds: list[int]):
    assert parse_worlds(text) == worlds


@pytest.mark.parametrize("text", ["", "0", "0..8", "64..8", "8,", "-8", "all", "8..", "1000001"])
def test_what_is_no_world(text: str):
    with pytest.raises(UserError, match=r"no such worlds.*8\.\.1024.*change --world"):
        parse_worlds(text)


def test_bytes_over_a_link_are_what_hand_computes():
    """135 million parameters, reduced once a step on two nodes of 8: 6 bytes each over a link that is all there is."""
    setup = make_setup("engine.reduce_gradients=step", recipe=SMOL, world=16, device="cuda")
    network = Network(8, within=Link(1e30, 0.0), between=Link(1e9, 0.0))
    seconds = communication_seconds(setup, network, backward_s=0.0)
    tcp_hops_s = 2 * 2 * 50e-6  # of the hosts' numbers, around the ring and again, two latencies each
    assert seconds == pytest.approx(6 * 134_515_008 * 15 / 16 / 1e9 + tcp_hops_s, rel=1e-6)


def test_a_fast_network_scales_and_a_slow_one_stops_to_pay():
    fast, slow = (scale(*GROWING, worlds="8..1024", between=link) for link in ("1000gbyte,0us", "1gbit,50us"))
    assert [point.nodes for point in fast.points] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert fast.points[1].efficiency > 0.9
    assert fast.points[0].efficiency == slow.points[0].efficiency == 1.0
    assert slow.points[1].efficiency < 0.1, "6 bytes of 135 million parameters over 1 Gbit/s"
    assert slow.last_that_pays.world == 8
    assert fast.last_that_pays.world > 8
    efficiencies = [point.efficiency for point in fast.points]
    assert efficiencies == sorted(efficiencies, reverse=True), "latency grows with the ranks"


def test_it_pays_while_an_added_rank_brings_half_of_what_one_did_at_first():
    [first] = scale(*GROWING, worlds="8").points

    def point(world: int, tokens_per_s: float) -> ScalingPoint:
        setup = dataclasses.replace(first.setup, world=world)
        return dataclasses.replace(first, setup=setup, speed=SpeedEstimate({}, tokens_per_s, 0.0))

    one, two = point(8, 800), point(16, 800 + 8 * 51)  # 100 a rank at first
    assert Scaling([one, two, point(32, 1208 + 16 * 49)], {}, None).last_that_pays is two
    assert Scaling([one, two, point(32, 1208 + 16 * 51)], {}, None).last_that_pays.world == 32


def test_failures_are_of_several_nodes_alone_and_grow_with_them():
    scaling = scale(*GROWING, worlds="8..4096")
    assert scaling.points[0].cadence is None
    lost = [point.cadence.lost_share for point in scaling.points[1:] if point.cadence]
    assert len(lost) == 9
    assert 0 < lost[0] < lost[-1] < 0.2
    assert lost == sorted(lost)
    rare = scale(*GROWING, worlds="16", mtbf_hours=6e6)
    assert rare.points[0].cadence.lost_share < lost[0] / 10  # type: ignore
    assert scale(*GROWING, worlds="4,8").costs is None


def test_what_a_checkpoint_costs_is_what_hand_computes():
    """ZeRO-2, AdamW, bf16: 12 bytes a parameter shared by the ranks, and the weights; all of it written."""
    costs = failure_costs(make_setup(recipe=SMOL, world=16, device="cuda"), node_mtbf_hours=2.0)
    N = 134_515_008
    assert costs.node_mtbf_s == 7200
    assert costs.pause_s == pytest.approx(0.2 + N * (2 + 12 / 16) / 10e9)
    assert costs.publish_s == pytest.approx(N * 14 / 1e9)


def test_worlds_that_rows_do_not_divide_are_left_out_with_the_reason():
    scaling = scale(*FIXED, worlds="8,12,20")
    assert [point.world for point in scaling.points] == [8, 12]
    assert "the rows per step do not divide evenly, 96 rows on 20 ranks" in scaling.skipped[20]
    with pytest.raises(UserError, match="do not divide evenly"):
        scale(*FIXED, worlds="20,40")
