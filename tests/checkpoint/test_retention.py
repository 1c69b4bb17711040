"""Which checkpoints stay."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoltrain.checkpoint.retention import delete_checkpoint, shutil, steps_to_keep
from smoltrain.config.schema import CheckpointSection, PhaseSection
from smoltrain.schedule import Plan

PLAN = Plan((PhaseSection(name="main", steps=8, lr=1e-3), PhaseSection(name="more", steps=4, lr=1e-3)))
LOSSES = {2: 5.0, 4: 3.0, 6: None, 8: 4.0, 10: 4.5}


@pytest.mark.parametrize(
    ("section", "kept"),
    [
        ({"keep_last": 1}, {8, 10}),
        ({"keep_last": 2}, {8, 10}),
        ({"keep_last": 3}, {6, 8, 10}),
        ({"keep_last": 1, "keep_every": 4}, {4, 8, 10}),
        ({"keep_last": 1, "keep_best": True}, {4, 8, 10}),
        ({"keep_last": 9}, {2, 4, 6, 8, 10}),
    ],
)
def test_the_last_the_ends_of_phases_the_nth_and_the_best_stay(section: dict, kept: set[int]):
    assert steps_to_keep(LOSSES, PLAN, CheckpointSection(**section)) == kept


def test_without_a_measured_loss_there_is_no_best():
    assert steps_to_keep({2: None, 4: None}, PLAN, CheckpointSection(keep_last=1, keep_best=True)) == {4}


@given(
    st.dictionaries(st.integers(1, 12), st.none() | st.floats(0, 20), min_size=1),
    st.integers(1, 4), st.integers(0, 5), st.booleans(),
)  # fmt: skip
def test_the_newest_always_stays_and_nothing_is_invented(losses: dict, last: int, every: int, best: bool):
    kept = steps_to_keep(losses, PLAN, CheckpointSection(keep_last=last, keep_every=every, keep_best=best))
    assert max(losses) in kept
    assert kept <= losses.keys()


def test_a_checkpoint_that_leaves_never_looks_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "step-00000004"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")

    def crash(path: Path, **_: object) -> None:
        if path.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", crash)
    with pytest.raises(KeyboardInterrupt):
        delete_checkpoint(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000004.old.tmp"], "which the next start sweeps"
