"""Which run of W&B a run folder writes to, and what it lacks: after kills, going back, copies and moves."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from smoltrain.config.schema import Config
from smoltrain.run.run_folder import RunFolder
from smoltrain.run.wandb_id import UNDONE_METRICS_FILE, WANDB_FILE, WandbIdentity, choose_wandb_identity
from smoltrain.schedule import Plan, first_differing_step
from tests import tiny

ID = "12345678"


def at(folder: Path) -> RunFolder:
    folder.mkdir(parents=True, exist_ok=True)
    return tiny.run_folder(folder)


def config(folder: Path, *words: str) -> Config:
    constant = ("phases.main.schedule=constant", "phases.main.final_lr=0", "phases.continuation.schedule=constant")
    return tiny.load(folder, "track.wandb=offline", *constant, *words)


def told(folder: Path, settings: Config, through: int, *, killed: bool = False, first_step: int = 0) -> str:
    """A start that gave W&B so many steps; its id."""
    identity = choose_wandb_identity(settings, at(folder), first_step)
    WandbIdentity(**{**identity.__dict__, "through": through, "open": killed}).write(folder)
    return identity.id


def undone(folder: Path, *steps: int) -> None:
    with (folder / UNDONE_METRICS_FILE).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"step": step}) + "\n" for step in steps)


def test_a_new_folder_has_the_id_of_its_provenance_and_keeps_it(tmp_path: Path) -> None:
    settings = config(tmp_path)
    first = choose_wandb_identity(settings, at(tmp_path / "run"), 0)
    assert (first.id, first.through, first.why) == (ID, 0, None)
    assert told(tmp_path / "run", settings, 5) == ID
    again = choose_wandb_identity(settings, at(tmp_path / "run"), 5)
    assert (again.id, again.through, again.why) == (ID, 5, None)


def test_steps_that_it_was_not_told_are_remembered_unless_the_process_was_killed(tmp_path: Path) -> None:
    told(tmp_path / "run", config(tmp_path), 3)
    assert choose_wandb_identity(config(tmp_path), at(tmp_path / "run"), 5).through == 3, "W&B was off"
    told(tmp_path / "run", config(tmp_path), 3, killed=True)
    assert choose_wandb_identity(config(tmp_path), at(tmp_path / "run"), 5).through == 5


def test_a_plan_in_the_words_of_an_earlier_version_is_the_same_plan(tmp_path: Path) -> None:
    """Else W&B would have been given every step of a killed run by another plan."""
    told(tmp_path / "run", config(tmp_path), 5, killed=True)
    file = tmp_path / "run" / WANDB_FILE
    tree = json.loads(file.read_text(encoding="utf-8"))
    optimizer = tree["plan"]["optimizer"]
    tree["plan"]["optimizer"] = {
        "name": optimizer["kind"],
        **{key: optimizer[key] for key in ("beta1", "beta2", "eps", "gradient_clipping", "z_loss")},
    }
    file.write_text(json.dumps(tree), encoding="utf-8")
    again = choose_wandb_identity(config(tmp_path), at(tmp_path / "run"), 3)
    assert (again.id, again.why) == (ID, None)
    other = choose_wandb_identity(config(tmp_path, "optimizer=muon"), at(tmp_path / "run"), 3)
    assert other.why == f"a new id: steps 4 to 5 of {ID} are of another plan"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"id": "a", "colour": 1}', "null", '{"id": "", "folder": "", "plan": 1}']
)
def test_what_cannot_be_read_is_as_good_as_nothing(tmp_path: Path, text: str) -> None:
    (at(tmp_path / "run").path / WANDB_FILE).write_text(text, encoding="utf-8")
    assert choose_wandb_identity(config(tmp_path), at(tmp_path / "run"), 0).id == ID


def test_a_folder_from_before_there_was_such_a_file_has_told_what_it_did(tmp_path: Path) -> None:
    (at(tmp_path / "run").path / "wandb").mkdir()
    undone(tmp_path / "run", 7, 8)
    assert choose_wandb_identity(config(tmp_path), at(tmp_path / "run"), 6).through == 8


# ---- going back


@pytest.mark.parametrize(
    ("words", "new"),
    [
        ([], None),
        (["phases.continuation.steps=400"], None),  # a longer plan leaves steps 7 to 10 alone
        (["track.print_every=1", "evaluate.every=1", "checkpoint.keep_last=1"], None),
        (["phases.continuation.lr=1e-5"], "a new id: steps 9 to 10 of 12345678 are of another plan"),
        (["phases.main.steps=7"], "a new id: steps 8 to 10 of 12345678 are of another plan"),
        (["phases.continuation.weight_decay=0.5"], "a new id: steps 9 to 10 of 12345678 are of another plan"),
        (["phases.continuation.optimizer_state=reset"], "a new id: steps 9 to 10 of 12345678 are of another plan"),
        (["phases.continuation.steps=1"], "a new id: steps 10 to 10 of 12345678 are of another plan"),
        (["optimizer.gradient_clipping=2"], "a new id: steps 7 to 10 of 12345678 are of another plan"),
        (["packing.document_mask=true"], "a new id: steps 7 to 10 of 12345678 are of another plan"),
    ],
)
@pytest.mark.parametrize("killed", [False, True])
def test_another_plan_of_told_steps_is_another_run(
    tmp_path: Path, words: list[str], new: str | None, killed: bool
) -> None:
    run = tmp_path / "run"
    told(run, config(tmp_path), 4 if killed else 10, killed=killed)
    undone(run, 7, 8, 9, 10)
    found = choose_wandb_identity(config(tmp_path, *words), at(run), 6)
    assert found.why == new
    assert (found.id, found.through) == ((f"{ID}-2", 0) if new else (ID, 10))


def test_going_back_again_counts_on(tmp_path: Path) -> None:
    run, ids = tmp_path / "run", []
    for n in range(1, 4):
        ids.append(told(run, config(tmp_path, f"phases.continuation.lr={n}e-4"), 12))
        undone(run, *range(7, 13))
    assert ids == [ID, f"{ID}-2", f"{ID}-3"]


def test_what_was_undone_under_an_earlier_id_is_not_told_under_the_new_one(tmp_path: Path) -> None:
    run = tmp_path / "run"
    told(run, config(tmp_path), 12)
    undone(run, *range(7, 13))
    back = config(tmp_path, "phases.main.lr=1e-3")
    assert told(run, back, 8, killed=True, first_step=6) == f"{ID}-2"
    undone(run, 7, 8)
    found = choose_wandb_identity(back, at(run), 6)
    assert (found.id, found.through) == (f"{ID}-2", 8)


def test_a_change_that_was_seen_before_a_kill_is_not_forgotten(tmp_path: Path) -> None:
    run = tmp_path / "run"
    told(run, config(tmp_path), 10)
    back = config(tmp_path, "phases.main.lr=1e-3")
    for _ in range(2):  # the first start died before it opened W&B
        assert choose_wandb_identity(back, at(run), 6).id == f"{ID}-2"


def test_where_two_plans_part(tmp_path: Path) -> None:
    def plan(*words: str) -> Plan:
        return Plan(tiny.load(tmp_path, *words).phases)

    usual = plan()
    assert first_differing_step(usual, usual, 0) is None
    assert first_differing_step(usual, plan("phases.main.lr=1e-3"), 5) == 6
    assert first_differing_step(usual, plan("phases.continuation.lr=1e-3"), 2) == 9
    assert first_differing_step(usual, plan("phases.continuation.steps=2"), 10) == 11
    assert first_differing_step(usual, plan("phases.continuation.steps=8"), 12) == 13


# ---- copies and moves


def test_a_copy_has_an_id_of_its_own_as_long_as_the_original_is_there(tmp_path: Path) -> None:
    settings, original, copy = config(tmp_path), tmp_path / "a", tmp_path / "b"
    told(original, settings, 8)
    shutil.copytree(original, copy)
    found = choose_wandb_identity(settings, at(copy), 8)
    assert found.id not in (ID, "")
    assert (found.through, found.why) == (0, f"an id of its own: this folder is a copy of {original}")
    found.write(copy)
    assert choose_wandb_identity(settings, at(copy), 8).id == found.id, "once"
    assert choose_wandb_identity(settings, at(original), 8).id == ID
    shutil.copytree(copy, tmp_path / "c")
    assert choose_wandb_identity(settings, at(tmp_path / "c"), 8).id not in (ID, found.id)


@pytest.mark.parametrize("kind", ["moved", "link", "replaced"])
def test_a_moved_folder_is_no_copy(tmp_path: Path, kind: str) -> None:
    settings, original, now = config(tmp_path), tmp_path / "a", tmp_path / "b"
    told(original, settings, 8)
    if kind == "link":
        now.symlink_to(original)
    else:
        original.rename(now)
    if kind == "replaced":  # another run lies where it was
        WandbIdentity("other", str(original), {}).write(at(original).path)
    found = choose_wandb_identity(settings, at(now), 8)
    assert (found.id, found.through, found.why) == (ID, 8, None)
    assert found.folder == str((original if kind == "link" else now).resolve())


@pytest.mark.skipif(not Path("/proc/self/root").exists(), reason="needs a second path that no link explains")
def test_a_folder_that_is_mounted_twice_is_no_copy(tmp_path: Path) -> None:
    elsewhere = WandbIdentity("mine", f"/proc/self/root{tmp_path / 'run'}", {})
    elsewhere.write(at(tmp_path / "run").path)
    assert choose_wandb_identity(config(tmp_path), at(tmp_path / "run"), 0).id == "mine"


# ---- an id that somebody asks for


def test_an_id_that_is_asked_for_is_taken_and_goes_back_too(tmp_path: Path) -> None:
    run = tmp_path / "run"
    told(run, config(tmp_path), 12)
    mine: dict[str, Any] = {"folder": run, "through": 12}
    assert told(settings=config(tmp_path, "track.wandb_id=mine"), **mine) == "mine"
    assert told(settings=config(tmp_path, "track.wandb_id=mine"), **mine) == "mine"
    back = config(tmp_path, "track.wandb_id=mine", "phases.main.lr=1e-3")
    assert told(settings=back, first_step=6, **mine) == "mine-2"
    assert told(settings=back, first_step=6, **mine) == "mine-2"
    assert told(settings=config(tmp_path, "phases.main.lr=1e-3"), first_step=12, **mine) == "mine-2", "kept"
