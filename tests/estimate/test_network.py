"""Links in words, and what is assumed of each device."""

import pytest

from smoltrain.errors import UserError
from smoltrain.estimate.collectives import Link
from smoltrain.estimate.constants import EFFICIENCY, GPUS, NODES
from smoltrain.estimate.network import NetworkWish, build_network, describe_network, host_network, parse_link


@pytest.mark.parametrize(
    ("text", "link"),
    [
        ("100gbit", Link(12.5e9, 7e-6)),
        ("25Gbit/s,50us", Link(3.125e9, 50e-6)),
        ("100mbit,10ms", Link(12.5e6, 10e-3)),
        ("450gbyte,0us", Link(450e9, 0.0)),
        ("1.5mbyte", Link(1.5e6, 7e-6)),
    ],
)
def test_a_link_in_words(text: str, link: Link):
    found = parse_link(text, "--between", usual_latency_s=7e-6)
    assert (found.bytes_per_s, found.latency_s) == pytest.approx((link.bytes_per_s, link.latency_s))


@pytest.mark.parametrize(
    "text", ["", "fast", "100", "100gb", "0gbit", "1.2.3gbit", "100gbit,5", "100gbit,5s", "-1gbit"]
)
def test_what_is_no_link(text: str):
    with pytest.raises(UserError, match=r"no such link.*100gbit or 25gbit,50us.*change --between"):
        parse_link(text, "--between", 0.0)


def test_every_device_has_its_nodes():
    assert NODES.keys() == {*GPUS, "cpu"}
    for device in GPUS.values():
        rates = EFFICIENCY["cuda"]
        network = build_network(device, rates, 1024)
        assert network.num_nodes(1024) == 128
        assert network.within.bytes_per_s == device.link * rates.link
        assert 0 < rates.network < 1


def test_what_is_asked_for_takes_the_place_of_what_is_usual():
    wish = NetworkWish(ranks_per_node=4, between="100gbit,5us")
    network = build_network(GPUS["h100"], EFFICIENCY["cuda"], 8, wish)
    assert network.num_nodes(8) == 2
    assert (network.between.bytes_per_s, network.between.latency_s) == pytest.approx((0.9 * 12.5e9, 5e-6))
    says = describe_network(GPUS["h100"], network, 8, wish)
    assert "4 ranks a node; within it 270 GB/s and 3.4 us a rank (NVLink, its data sheet)" in says
    assert "between nodes 11.2 GB/s and 5 us a node (--between)" in says
    usual = build_network(GPUS["h100"], EFFICIENCY["cuda"], 8)
    says = describe_network(GPUS["h100"], usual, 8, NetworkWish())
    assert "8 ranks a node (assumed)" in says
    assert "between" not in says, "of one node"
    hosts = host_network(network)
    assert (hosts.backend, hosts.between.latency_s) == ("gloo", 50e-6), "gloo: rings over TCP"
