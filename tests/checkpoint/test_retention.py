"""Which checkpoints stay, and that the others go without harm."""

import errno
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoltrain.checkpoint.manifest import list_checkpoint_steps
from smoltrain.checkpoint.retention import (
    Validation,
    delete_checkpoint,
    delete_leftovers,
    prune_checkpoints,
    steps_to_keep,
)
from smoltrain.config.schema import CheckpointSection, Config, PhaseSection
from smoltrain.schedule import Plan
from tests.checkpoint.saving import save_steps

PLAN = Plan((PhaseSection(name="main", steps=8, lr=1e-3), PhaseSection(name="more", steps=4, lr=1e-3)))


def on_64_rows(losses: dict[int, float | None]) -> dict[int, Validation]:
    """Steps with their losses, measured on the same rows."""
    return {step: Validation(loss, 64) for step, loss in losses.items()}


LOSSES = on_64_rows({2: 5.0, 4: 3.0, 6: None, 8: 4.0, 10: 4.5})


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
    assert steps_to_keep(on_64_rows({2: None, 4: None}), PLAN, CheckpointSection(keep_last=1, keep_best=True)) == {4}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_never_the_best(bad: float):
    best = CheckpointSection(keep_last=1, keep_best=True)
    assert steps_to_keep(on_64_rows({1: bad, 2: 3.0, 3: 2.0, 5: 4.0}), PLAN, best) == {3, 5}
    assert steps_to_keep(on_64_rows({1: bad, 5: bad}), PLAN, best) == {5}


def test_losses_on_other_rows_are_not_compared():
    """Of the easy first four rows alone step 1 has the lowest loss, of all 64 step 3, of the 256 since then step 5."""
    validations = {1: Validation(1.0, 4), 2: Validation(1.5, 4)}
    validations |= {3: Validation(3.0, 64), 4: Validation(3.2, 64)}
    validations |= {5: Validation(3.1, 256), 6: Validation(3.4, 256), 7: Validation(None, 256)}
    assert steps_to_keep(validations, PLAN, CheckpointSection(keep_last=1, keep_best=True)) == {1, 3, 5, 7}


@given(
    st.dictionaries(st.integers(1, 12), st.none() | st.floats(0, 20), min_size=1),
    st.integers(1, 4), st.integers(0, 5), st.booleans(),
)  # fmt: skip
def test_the_newest_always_stays_and_nothing_is_invented(losses: dict, last: int, every: int, best: bool):
    kept = steps_to_keep(on_64_rows(losses), PLAN, CheckpointSection(keep_last=last, keep_every=every, keep_best=best))
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


# --- on disk


def test_the_newest_the_ends_of_phases_and_nothing_else_are_kept(settings: Config, ranks: Any) -> None:
    ranks(2).run(save_steps, settings, [2, 4, 6, 8, 9, 10, 11, 12], 2)
    assert list_checkpoint_steps(settings.run_folder / "checkpoints") == [8, 11, 12]


def test_leftovers_of_a_crash_are_no_checkpoints_and_are_swept(two_checkpoints: Path) -> None:
    leftovers = [two_checkpoints / "step-00000007.tmp", two_checkpoints / "step-00000003.old.tmp"]
    for leftover in leftovers:
        leftover.mkdir()
        (leftover / "half.pt").write_bytes(b"half")
    assert list_checkpoint_steps(two_checkpoints) == [3, 6]
    delete_leftovers(two_checkpoints)
    assert sorted(p.name for p in two_checkpoints.iterdir()) == ["step-00000003", "step-00000006"]


def test_links_and_files_among_checkpoints_go_without_harm_to_what_they_lead_to(
    settings: Config, tmp_path: Path
) -> None:
    checkpoints, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    for folder in (checkpoints / "step-00000004", elsewhere / "step-00000002", elsewhere / "half"):
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    (checkpoints / "step-00000002").symlink_to("../elsewhere/step-00000002")
    (checkpoints / "step-00000003").symlink_to(elsewhere / "nowhere")
    (checkpoints / "step-00000001").write_text("a file")
    (checkpoints / "step-00000007.tmp").symlink_to(elsewhere / "half")
    (checkpoints / "step-00000008.tmp").write_text("a file")
    (checkpoints / "step-00000009.tmp").mkdir()
    assert delete_leftovers(checkpoints) == []
    section = settings.checkpoint.model_copy(update={"keep_last": 1})
    assert prune_checkpoints(checkpoints, 4, Plan(settings.phases), section) == []
    left = sorted(path.name for path in checkpoints.iterdir())
    assert left == ["step-00000001", "step-00000003", "step-00000004"], "what is no checkpoint is nobody's to delete"
    assert (elsewhere / "step-00000002" / "manifest.json").exists()
    assert (elsewhere / "half" / "manifest.json").exists()


def test_what_cannot_be_deleted_is_named_and_left_and_the_rest_goes(
    settings: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("step-00000002", "step-00000003", "step-00000004", "step-00000005.tmp", "step-00000006.tmp"):
        (tmp_path / name).mkdir()
    whole = shutil.rmtree

    def refuse(path: Path) -> None:
        if "2" in path.name or "5" in path.name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path / "x"))
        whole(path)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    [line] = delete_leftovers(tmp_path)
    assert line == (
        f"WARNING: {tmp_path}/step-00000005.tmp is left over and could not be deleted "
        f"(Permission denied: {tmp_path}/step-00000005.tmp/x)"
    )
    section = settings.checkpoint.model_copy(update={"keep_last": 1})
    [line] = prune_checkpoints(tmp_path, 4, Plan(settings.phases), section)
    assert line.startswith(
        f"WARNING: {tmp_path}/step-00000002 is left over and could not be deleted (Permission denied"
    )
    left = sorted(path.name for path in tmp_path.glob("step-*"))
    assert left == ["step-00000002.old.tmp", "step-00000004", "step-00000005.tmp"]
