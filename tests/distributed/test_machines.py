"""Ranks of one machine, by kernel and launcher, whatever the machines are called."""

import pytest

from smoltrain.distributed.machines import RankFacts, identify_kernel, name_machines, number_machines


def facts(*ranks: tuple[str, str, int | None, int | None]) -> list[RankFacts]:
    return [RankFacts(host, kernel, node, local, f"10.0.0.{n}") for n, (host, kernel, node, local) in enumerate(ranks)]


@pytest.mark.parametrize(
    ("ranks", "machines"),
    [
        ([("a", "1", 0, 0), ("a", "1", 0, 1), ("b", "2", 2, 0), ("b", "2", 2, 1)], (0, 0, 1, 1)),
        ([("a", "1", 0, 0), ("b", "2", 1, 0), ("a", "1", 1, 1), ("b", "2", 2, 1)], (0, 1, 0, 1)),  # dealt cyclically
        ([("a", "1", 0, 0), ("a", "2", 1, 0)], (0, 1)),  # cloned images
        ([("a", "1", 0, 0), ("a", "1", 0, 1), ("a", "1", 2, 0), ("a", "1", 2, 1)], (0, 0, 1, 1)),  # snapshots
        ([("a", "1", None, None), ("a", "2", None, None)], (0, 1)),  # PyTorchJob
        ([("a", "1", None, None), ("a", "1", None, None)], (0, 0)),
    ],
)
def test_a_machine_is_a_kernel_and_what_a_launcher_says(
    ranks: list[tuple[str, str, int | None, int | None]], machines: tuple[int, ...]
) -> None:
    assert number_machines(facts(*ranks)) == machines


def test_machines_of_one_name_are_told_apart_by_their_addresses() -> None:
    assert name_machines(facts(("a", "1", 0, 0), ("a", "2", 1, 0)), (0, 1)) == ("a (10.0.0.0)", "a (10.0.0.1)")
    assert name_machines(facts(("a", "1", 0, 0), ("a", "1", 0, 1)), (0, 0)) == ("a", "a")
    assert name_machines(facts(("a", "1", 0, 0), ("b", "2", 1, 0)), (0, 1)) == ("a", "b")


def test_facts_come_through_a_store_as_they_were() -> None:
    [fact] = facts(("a", identify_kernel(), None, 3))
    assert RankFacts.from_text(fact.to_text()) == fact
