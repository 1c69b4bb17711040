"""Rows by place: all of them once an epoch; a source that reads can go back."""

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.rows.test_row_contents import SHARDS, V
from tests.data.worlds import WORLDS, B, T, World, cached, section, streamed, write


@settings(max_examples=20)
@given(st.integers(B, 40), st.sampled_from(WORLDS))
def test_an_epoch_holds_each_row_once(num_rows: int, world: int):
    ranks = World(cached(num_rows), world)
    seen = []
    for _ in range(3 * num_rows // B):
        rows = ranks.rows()
        positions = np.concatenate([loader._next.positions for loader in ranks.ranks])
        seen += [(row[0] - 1) // T for _, row in sorted(zip(positions, rows, strict=True))]
        ranks.step()
    for start in range(0, len(seen) - num_rows + 1, num_rows):
        assert sorted(seen[start : start + num_rows]) == list(range(num_rows))


def test_a_loader_that_has_begun_can_go_back(tmp_path: Path) -> None:
    folders = {"s0": write(tmp_path / "c", SHARDS)}
    world = World(streamed(folders, V), 2, section(folders))
    world.steps(3)
    state, ledger = world.state(), world.ledger
    first = world.steps(5)
    world.load(state)
    assert world.ledger == ledger
    again = world.steps(5)
    world.close()
    assert (first == again).all()
