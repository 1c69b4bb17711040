"""Whatever is done to a checkpoint's files: the one before it is used and the file is named, or nothing is used at all.

And no code that lies in a file ever runs: the harmful pickles here would leave a file behind.
"""

import ctypes
import dataclasses
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from smoltrain import files
from smoltrain.checkpoint.manifest import (
    DIGEST_KEY,
    MANIFEST_FILE,
    Manifest,
    find_newest_valid_checkpoint,
    list_checkpoint_steps,
    read_manifest,
    step_folder,
    verify_checkpoint,
    write_manifest,
)
from smoltrain.errors import BAD_INPUT, FAULT, TrainingStopped, UserError
from smoltrain.inference.load import load_trained_model
from tests import tiny
from tests.whole_runs.test_crash import check_same, stop_at
from tests.zygote import zygote

SETTINGS = ("model.dropout=0.1", "phases.main.steps=4", "phases.continuation.steps=2", "checkpoint.every=2")
MODEL, OURS, THEIRS = (
    "deepspeed/mp_rank_00_model_states.pt",
    "deepspeed/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "deepspeed/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
)
PICKLED = (MODEL, OURS, THEIRS, "rank-00000.pt", "rank-00001.pt")
FILES = (*PICKLED, "model.safetensors")


def words(folder: Path, *overrides: str) -> list[str]:
    return tiny.words(folder, *SETTINGS, *overrides)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two ranks that stopped behind its checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("original")
    life = zygote().train(words(folder, "run.stop_after=main"), 2, folder / "log")
    assert life.end() == [0, 0], life.text()
    return folder


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    """A copy of it, to be harmed."""
    shutil.copytree(original / "runs", tmp_path / "runs")
    return tmp_path / "runs" / "quickstart"


def folder_of(run: Path, step: int = 4) -> Path:
    return step_folder(run / "checkpoints", step)


def check_falls_back(run: Path, name: str) -> None:
    """Step 2 is found, and one line names the file of step 4."""
    said: list[str] = []
    found = find_newest_valid_checkpoint(run / "checkpoints", said.append)
    assert found is not None
    assert found.step == 2
    assert len(said) == 1
    assert said[0].startswith("checkpoint of step 4 is passed over: ")
    assert str(folder_of(run) / name) in said[0]
    assert "\n" not in said[0]
    assert len(said[0]) < 1000


def test_the_checkpoints_hold_these_files_and_no_others(run: Path) -> None:
    for step in (2, 4):
        found = verify_checkpoint(folder_of(run, step))
        assert isinstance(found, Manifest)
        assert sorted(found.files) == sorted(FILES)
        here = {str(p.relative_to(folder_of(run, step))) for p in folder_of(run, step).rglob("*") if p.is_file()}
        assert here == {*FILES, MANIFEST_FILE}


# ---- files that are not what was written


def flip(path: Path, place: float) -> None:
    """Turn one bit over, at a place between 0 and 1."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


HARMS: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "empty": lambda path: os.truncate(path, 0),
    "truncated": lambda path: os.truncate(path, path.stat().st_size * 2 // 3),
    "without its last byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: os.truncate(path, path.stat().st_size + 1),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "first bit": lambda path: flip(path, 0),
    "middle bit": lambda path: flip(path, 0.5),
    "last bit": lambda path: flip(path, 1),
    "of another step": lambda path: replace(path, lambda p: shutil.copy(str(p).replace("00004", "00002"), p)),
    "a folder": lambda path: replace(path, Path.mkdir),
    "a link to nothing": lambda path: replace(path, lambda p: p.symlink_to("nowhere")),
    "a link to itself": lambda path: replace(path, lambda p: p.symlink_to(p)),
    "a pipe": lambda path: replace(path, os.mkfifo),
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", FILES)
def test_a_harmed_file_costs_its_checkpoint_and_no_more(run: Path, name: str, harm: str) -> None:
    HARMS[harm](folder_of(run) / name)
    check_falls_back(run, name)


@pytest.mark.parametrize("name", [*FILES, MANIFEST_FILE])
def test_files_of_two_steps_in_each_others_place_are_both_refused(run: Path, name: str) -> None:
    ours, theirs, aside = folder_of(run, 4) / name, folder_of(run, 2) / name, run / "aside"
    ours.rename(aside)
    theirs.rename(ours)
    aside.rename(theirs)
    with pytest.raises(UserError, match="no checkpoint of this run is whole") as error:
        find_newest_valid_checkpoint(run / "checkpoints", lambda _: None)
    assert str(ours) in str(error.value)
    assert str(theirs) in str(error.value)


# ---- the manifest


def edited(run: Path, change: Callable[[dict[str, Any]], object], seal: bool = False) -> None:
    """Change the manifest of step 4 as a user may with an editor; `seal` makes its own digest fit again."""
    path = folder_of(run) / MANIFEST_FILE
    tree = json.loads(path.read_text(encoding="utf-8"))
    change(tree)
    if seal:
        tree = files.seal_json(tree, DIGEST_KEY)
    path.write_text(json.dumps(tree), encoding="utf-8")


FIELDS = [field.name for field in dataclasses.fields(Manifest)]
ANOTHER = {int: lambda x: x + 1, str: lambda x: x + "x", dict: lambda x: {**x, "more": {}}, type(None): lambda x: 1.5}
ANOTHER[float] = lambda x: x * 1.01
MANIFESTS: dict[str, bytes] = {
    "empty": b"",
    "half": b'{"format": 2, "step": 4, ',
    "not JSON": b"step 4",
    "a number": b"4",
    "null": b"null",
    "a list": b"[]",
    "an empty object": b"{}",
    "not a number": b'{"format": NaN}',
    "not UTF-8": b'{"format": "\xff\xfe"}',
    "zeros": bytes(4096),
    "deeply nested": b'{"format":' * 100_000,
    "a very long number": b'{"format": ' + b"9" * 10_000 + b"}",
    "a pickle": pickle.dumps({"format": 2}),
}


def renamed(tree: dict[str, Any], name: str) -> None:
    """The weights' record under another name, as whoever seals a manifest of their own may write it."""
    tree["files"][name] = tree["files"][FILES[-1]]


FORGED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "above": (lambda t: renamed(t, "../step-00000002/model.safetensors"), "a name leads out of its folder"),
    "absolute": (lambda t: renamed(t, "/etc/passwd"), "a name leads out of its folder"),
    "empty": (lambda t: renamed(t, ""), "a name leads out of its folder"),
    "no file": (lambda t: t.update(files={}), "names no model.safetensors"),
    "no weights": (lambda t: t["files"].pop("model.safetensors"), "names no model.safetensors"),
    "no shards": (
        lambda t: t.update(files={n: r for n, r in t["files"].items() if "optim" not in n}),
        "cannot be trained on: it has the optimizer states of 0 ranks, not of 2",
    ),
    "no states": (
        lambda t: t["files"].pop(MODEL),
        "cannot be trained on: it has the model states of 0 ranks, not of 1",
    ),
    "one state": (lambda t: t["files"].pop("rank-00001.pt"), "the random states of 1 ranks, not of 2"),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_sealed_manifest_may_name_no_other_files_and_must_name_its_own(run: Path, case: str) -> None:
    change, told = FORGED[case]
    edited(run, change, seal=True)
    said: list[str] = []
    found = find_newest_valid_checkpoint(run / "checkpoints", said.append, trains=True)
    assert found is not None
    assert found.step == 2
    assert told in said[0]


def test_a_file_that_a_link_takes_elsewhere_is_none_of_the_checkpoint(run: Path, tmp_path: Path) -> None:
    path = folder_of(run) / "model.safetensors"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert "a name leads out of its folder" in str(verify_checkpoint(folder_of(run)))
    moved = run / "checkpoints" / "step-00000002"
    moved.rename(tmp_path / "step-00000002")
    moved.symlink_to(tmp_path / "step-00000002")  # of the folder itself its user has disposed
    assert isinstance(verify_checkpoint(moved), Manifest)


def test_a_shard_that_the_manifest_does_not_name_is_not_trained_on(run: Path) -> None:
    """DeepSpeed would take it for its own, as it finds files by how their names end, and nobody has hashed it."""
    shutil.copy(folder_of(run, 2) / MODEL, folder_of(run) / "deepspeed" / "0_mp_rank_00_model_states.pt")
    said: list[str] = []
    found = find_newest_valid_checkpoint(run / "checkpoints", said.append, trains=True)
    assert found is not None
    assert found.step == 2
    assert "deepspeed/0_mp_rank_00_model_states.pt is no file of this checkpoint" in said[0]


def test_a_manifest_that_is_a_pipe_is_not_waited_for(run: Path) -> None:
    path = folder_of(run) / MANIFEST_FILE
    path.unlink()
    os.mkfifo(path)
    assert "no regular file" in str(verify_checkpoint(folder_of(run)))


@pytest.mark.parametrize("content", MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_that_is_none_costs_its_checkpoint(run: Path, content: bytes) -> None:
    (folder_of(run) / MANIFEST_FILE).write_bytes(content)
    check_falls_back(run, MANIFEST_FILE)


@pytest.mark.parametrize("harm", [name for name in HARMS if name not in ("a pipe", "without its last byte")])
def test_a_harmed_manifest_costs_its_checkpoint(run: Path, harm: str) -> None:
    HARMS[harm](folder_of(run) / MANIFEST_FILE)
    check_falls_back(run, MANIFEST_FILE)


@pytest.mark.parametrize("field", FIELDS)
def test_an_edited_field_of_the_manifest_costs_its_checkpoint(run: Path, field: str) -> None:
    edited(run, lambda tree: tree.update({field: ANOTHER[type(tree[field])](tree[field])}))
    check_falls_back(run, MANIFEST_FILE)


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_is_missing_costs_the_checkpoint_even_if_the_digest_fits(run: Path, field: str) -> None:
    edited(run, lambda tree: tree.pop(field), seal=True)
    check_falls_back(run, MANIFEST_FILE)


@pytest.mark.parametrize("value", [["x"], 0.5], ids=str)
@pytest.mark.parametrize("field", [field for field in FIELDS if field != "validation_loss"])
def test_a_field_of_another_kind_costs_the_checkpoint_even_if_the_digest_fits(
    run: Path, field: str, value: object
) -> None:
    edited(run, lambda tree: tree.update({field: value}), seal=True)
    check_falls_back(run, MANIFEST_FILE)


@pytest.mark.parametrize("record", [None, {}, {"bytes": 1}, {"bytes": "1", "sha256": 1}], ids=str)
def test_a_record_of_another_kind_costs_the_checkpoint_even_if_the_digest_fits(run: Path, record: object) -> None:
    edited(run, lambda tree: tree["files"].update({MODEL: record}), seal=True)
    check_falls_back(run, "")


def test_a_field_more_costs_the_checkpoint(run: Path) -> None:
    edited(run, lambda tree: tree.update({"more": 1}), seal=True)
    check_falls_back(run, MANIFEST_FILE)


# ---- the folders


def test_a_folder_under_the_name_of_another_step_is_not_used(run: Path) -> None:
    folder_of(run, 2).rename(folder_of(run, 6))
    said: list[str] = []
    found = find_newest_valid_checkpoint(run / "checkpoints", said.append)
    assert found is not None
    assert found.step == 4
    assert said == [f"checkpoint of step 6 is passed over: {folder_of(run, 6) / MANIFEST_FILE} is that of step 2"]


def test_a_checkpoint_that_was_never_published_is_not_used(run: Path) -> None:
    folder_of(run).rename(folder_of(run).with_name(f"{folder_of(run).name}.tmp"))
    found = find_newest_valid_checkpoint(run / "checkpoints", print)
    assert found is not None
    assert found.step == 2


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")])
def test_a_checkpoint_with_nothing_in_it_is_passed_over(run: Path, make: Callable[[Path], None]) -> None:
    shutil.rmtree(folder_of(run))
    make(folder_of(run))
    check_falls_back(run, MANIFEST_FILE)


# ---- what may not be read


needs_capabilities = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "capset"),
    reason="capabilities are Linux's; the cases of a missing file run the same refusal",
)


def without_privileges(function: Callable[..., None] = lambda: None, *args: Any) -> None:
    """function(*args) in a process that the file system treats as any other user's, even if it is root's.

    capset(2) drops all capabilities, and with them root's right to read everything; the files are its own still.
    """
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    if ctypes.CDLL(None, use_errno=True).capset(header, nothing):
        raise OSError(ctypes.get_errno(), "capset")
    function(*args)


def tell_newest(checkpoints: Path) -> None:
    try:
        found = find_newest_valid_checkpoint(checkpoints, print)
        print("found", found.step if found else None)
    except UserError as error:
        print("refused:", error)


@needs_capabilities
@pytest.mark.parametrize("name", [*FILES, MANIFEST_FILE, "deepspeed", ""])
def test_what_may_not_be_read_is_passed_over_and_named(run: Path, tmp_path: Path, name: str) -> None:
    path = folder_of(run) / name
    mode = path.stat().st_mode
    path.chmod(0)
    life = zygote().fork(1, tmp_path / "log", without_privileges, tell_newest, run / "checkpoints")
    assert life.end() == [0], life.text()
    path.chmod(mode)
    first, second = life.text().splitlines()
    assert first.startswith("checkpoint of step 4 is passed over: ")
    assert str(path) in first
    assert "Permission denied" in first
    assert second == "found 2"


@needs_capabilities
def test_checkpoints_that_may_not_be_listed_are_not_taken_for_none(run: Path, tmp_path: Path) -> None:
    (run / "checkpoints").chmod(0)
    life = zygote().fork(1, tmp_path / "log", without_privileges, tell_newest, run / "checkpoints")
    assert life.end() == [0], life.text()
    (run / "checkpoints").chmod(0o755)
    assert life.text().startswith("refused: ")
    assert str(run / "checkpoints") in life.text()


# ---- files that would run code


class Harmful:
    """A pickle of it makes a file when the ordinary pickle loads it."""

    def __init__(self, proof: Path) -> None:
        self._proof = proof

    def __reduce__(self) -> Any:
        return Path.touch, (self._proof,)


def in_torchs_form(path: Path, proof: Path) -> None:
    torch.save({"module": Harmful(proof)}, path)


def in_its_old_form(path: Path, proof: Path) -> None:
    torch.save(Harmful(proof), path, _use_new_zipfile_serialization=False)


def as_plain_pickle(path: Path, proof: Path) -> None:
    path.write_bytes(pickle.dumps(Harmful(proof)))


FORMS = (in_torchs_form, in_its_old_form, as_plain_pickle)


def seal(run: Path) -> None:
    """Make the manifest of step 4 fit its files, whatever they are."""
    folder = folder_of(run)
    found = read_manifest(folder)
    assert isinstance(found, Manifest)
    records = {n: {"bytes": (folder / n).stat().st_size, "sha256": files.file_sha256(folder / n)} for n in found.files}
    write_manifest(folder, dataclasses.replace(found, files=records))
    assert isinstance(verify_checkpoint(folder), Manifest)


@pytest.mark.parametrize("form", FORMS)
def test_the_harmful_pickles_are_harmful(tmp_path: Path, form: Callable[[Path, Path], None]) -> None:
    form(tmp_path / "file", tmp_path / "proof")
    if form is as_plain_pickle:
        pickle.loads((tmp_path / "file").read_bytes())
    else:
        torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "proof").exists()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("form", FORMS)
def test_a_harmful_file_in_place_of_another_costs_its_checkpoint(
    run: Path, tmp_path: Path, name: str, form: Callable[[Path, Path], None]
) -> None:
    form(folder_of(run) / name, tmp_path / "proof")
    check_falls_back(run, name)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("name", PICKLED)
@pytest.mark.parametrize("form", FORMS)
def test_a_harmful_file_that_the_manifest_names_is_refused_before_anything_of_it_runs(
    run: Path, tmp_path: Path, name: str, form: Callable[[Path, Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    from smoltrain.run.verify import verify_one_checkpoint

    form(folder_of(run) / name, tmp_path / "proof")
    seal(run)
    assert not verify_one_checkpoint(run, 4)
    said = capsys.readouterr().out
    assert str(folder_of(run) / name) in said
    word = "is broken" if form is as_plain_pickle else "is refused"  # torch reads no bare pickle of today's protocol
    assert word in said
    with pytest.raises(TrainingStopped, match=word):
        files.read_tensors(folder_of(run) / name)
    assert not (tmp_path / "proof").exists()


def test_a_harmful_file_in_place_of_the_weights_is_refused(run: Path, tmp_path: Path) -> None:
    in_torchs_form(folder_of(run) / "model.safetensors", tmp_path / "proof")
    seal(run)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_trained_model(str(run))
    assert not (tmp_path / "proof").exists()


# ---- real restarts


def restart(run: Path, log: Path, *overrides: str) -> tuple[list[Any], str]:
    """The same command once more, on two ranks: exit codes and what was said."""
    life = zygote().train(words(run.parent.parent, *overrides), 2, log)
    return life.end(), life.text()


@pytest.mark.parametrize("name", [THEIRS, pytest.param(MODEL, marks=pytest.mark.slow)])
def test_a_restart_from_a_harmful_file_ends_with_its_name(run: Path, tmp_path: Path, name: str) -> None:
    in_torchs_form(folder_of(run) / name, tmp_path / "proof")
    seal(run)
    codes, said = restart(run, tmp_path / "log")
    assert codes == [FAULT, FAULT]
    assert f"{folder_of(run) / name} holds more than tensors and is refused" in said
    assert "Traceback" not in said
    assert not (tmp_path / "proof").exists()
    assert list_checkpoint_steps(run / "checkpoints") == [2, 4], "nothing was trained or deleted"


@pytest.mark.slow
def test_a_restart_without_any_whole_checkpoint_is_refused(run: Path, tmp_path: Path) -> None:
    for step in (2, 4):
        flip(folder_of(run, step) / MODEL, 0.5)
    ledger_before = (run / "ledger.bin").read_bytes()
    codes, said = restart(run, tmp_path / "log")
    assert codes == [BAD_INPUT, BAD_INPUT]
    assert "error: no checkpoint of this run is whole" in said
    assert "Traceback" not in said
    assert (run / "ledger.bin").read_bytes() == ledger_before


@pytest.fixture(scope="module")
def finished(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, gone on to its end from an unharmed checkpoint."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(original / "runs", folder / "runs")
    codes, said = restart(folder / "runs" / "quickstart", folder / "log")
    assert codes == [0, 0], said
    return folder / "runs" / "quickstart"


@pytest.mark.slow
@pytest.mark.parametrize("name", [MODEL, OURS, "rank-00001.pt", "model.safetensors", MANIFEST_FILE])
def test_a_restart_behind_a_harmed_checkpoint_ends_as_if_nothing_had_happened(
    run: Path, tmp_path: Path, finished: Path, name: str
) -> None:
    flip(folder_of(run) / name, 0.3)
    codes, said = restart(run, tmp_path / "log")
    assert codes == [0, 0], said
    assert "checkpoint of step 4 is passed over" in said
    assert "restored step 2 on 2 ranks" in said
    check_same(run, finished, last_step=6)
    assert isinstance(verify_checkpoint(folder_of(run, 4)), Manifest), "step 4 was saved anew"


@pytest.mark.slow
def test_a_damaged_checkpoint_of_a_later_step_takes_no_place_of_a_whole_one(run: Path, tmp_path: Path) -> None:
    flip(folder_of(run) / MODEL, 0.5)
    keep_one = ("checkpoint.every=1", "checkpoint.keep_last=1")
    life = zygote().train(words(tmp_path, *keep_one), 2, tmp_path / "log", stop_at, 0, "manifest", 2, "within")
    life.wait(lambda states: "stopped" in states)  # in the middle of step 4: step 3 is published, old ones are deleted
    life.kill()
    assert life.end() == [-9, -9]
    found = find_newest_valid_checkpoint(run / "checkpoints", print)
    assert found is not None
    assert found.step == 3
