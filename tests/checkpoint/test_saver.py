"""Checkpoints in one process pair: whole or not there, verified before use, the right ones kept."""

import errno
import json
import shutil
import threading
import time
from collections import OrderedDict, namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from smoltrain import files
from smoltrain.checkpoint.manifest import (
    Manifest,
    find_newest_valid_checkpoint,
    list_checkpoint_steps,
    step_folder,
    verify_checkpoint,
)
from smoltrain.checkpoint.restore import restore_checkpoint
from smoltrain.checkpoint.retention import delete_leftovers, prune_checkpoints
from smoltrain.checkpoint.saver import CheckpointSaver, copy_to_host
from smoltrain.config.schema import CheckpointSection, Config
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.errors import TrainingStopped, UserError
from smoltrain.schedule import Plan
from tests import tiny
from tests.engine.test_engine import fresh_model, loader_of
from tests.ranks import world
from tests.sessions import bare_session, train_steps

FACTS: dict[str, Any] = {
    "precision": "bf16", "skipped_updates": 0, "wandb_id": "abc", "validation_loss": None, "validation_rows": 8,
    "identity": {"run_id": "abc", "rows_per_step": 8, "values": {}, "phases": []},
}  # fmt: skip


def trained(settings: Config, steps: int) -> tuple[Any, Any, Plan]:
    """An engine and its loader after some steps, on this rank; 8 rows per step on one rank or two."""
    from smoltrain.engine.engine import build_engine

    here, plan, accumulation = world(), Plan(settings.phases), 4 // world().size
    torch.manual_seed(here.rank)
    wrapped = build_engine(fresh_model(settings), settings, here, precision="bf16", accumulation=accumulation)
    loader = loader_of(settings, here.rank, here.size, accumulation)
    run_steps(range(1, steps + 1), settings, wrapped, loader)
    return wrapped, loader, plan


def run_steps(steps: range, settings: Config, wrapped: Any, loader: Any) -> list[float]:
    """The losses of these steps."""

    results = train_steps(steps, bare_session(settings, wrapped, loader))
    return [float(r.metrics["train/loss_nats_per_token"]) for r in results]


def saver_of(settings: Config, plan: Plan, **options: Any) -> CheckpointSaver:
    section = CheckpointSection.model_validate({"keep_last": 9} | options)
    return CheckpointSaver(settings.run_folder / "checkpoints", world(), plan, section, say=lambda _: None)


def save_steps(settings: Config, steps: list[int], keep_last: int) -> None:
    wrapped, loader, plan = trained(settings, 1)
    writer = saver_of(settings, plan, keep_last=keep_last)
    for step in steps:
        writer.start_save(step, wrapped, loader, **FACTS)
    writer.finish()


@pytest.fixture
def settings(tmp_path: Path) -> Config:
    found = tiny.load(tmp_path, "engine.ds_config=zero2", "engine.precision=bf16", "model.dropout=0.1")
    prepare_run_data(found)
    return found


def restore(settings: Config, step: int, wrapped: Any, loader: Any) -> None:
    folder = step_folder(settings.run_folder / "checkpoints", step)
    manifest = verify_checkpoint(folder)
    assert isinstance(manifest, Manifest)
    restore_checkpoint(folder, manifest, wrapped, loader, world(), seed=settings.run.seed)


def losses_after(settings: Config, restored_from: int | None) -> tuple[list[float], dict[str, torch.Tensor], str]:
    """Losses of steps 4 to 6 and what they lead to, either straight through or by way of the disk."""
    writer = None
    if restored_from is None:
        wrapped, loader, plan = trained(settings, 3)
        writer = saver_of(settings, plan)
        writer.start_save(3, wrapped, loader, **FACTS)  # and the next steps are trained while it is written
    else:
        wrapped, loader, plan = trained(settings, 1)
        restore(settings, restored_from, wrapped, loader)
    losses = run_steps(range(4, 7), settings, wrapped, loader)
    if writer:
        writer.finish()
    return losses, wrapped.weights(keep=True), loader.ledger


@pytest.mark.parametrize(("stage", "by"), [(1, "auto"), (2, "step"), (2, "micro_batch"), (3, "auto")])
def test_a_restored_run_goes_on_bitwise_with_dropout(tmp_path: Path, ranks: Any, stage: int, by: str) -> None:
    words = (f"engine.ds_config=zero{stage}", "engine.precision=bf16", f"engine.reduce_gradients={by}")
    settings = tiny.load(tmp_path, *words, "model.dropout=0.1")
    prepare_run_data(settings)
    straight = ranks(2).run(losses_after, settings, None)
    resumed = ranks(2).run(losses_after, settings, 3)
    for (losses, weights, ledger), (losses_again, weights_again, ledger_again) in zip(straight, resumed, strict=True):
        assert losses == losses_again
        assert ledger == ledger_again
        assert all(torch.equal(weights[name], weights_again[name]) for name in weights)


def test_a_checkpoint_holds_what_its_manifest_says_and_readable_weights(settings: Config, ranks: Any) -> None:
    ranks(2).run(save_steps, settings, [3], 2)
    folder = step_folder(settings.run_folder / "checkpoints", 3)
    manifest = verify_checkpoint(folder)
    assert isinstance(manifest, Manifest)
    on_disk = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {"manifest.json"}
    assert set(manifest.files) == on_disk
    assert {"rank-00000.pt", "rank-00001.pt", "model.safetensors"} <= on_disk
    assert (manifest.step, manifest.phase, manifest.world_size, manifest.zero_stage) == (3, "main", 2, 2)
    weights = load_file(folder / "model.safetensors")
    assert weights["embed_tokens.weight"].dtype == torch.bfloat16
    assert not list(folder.parent.glob("*.tmp"))


def test_the_newest_the_ends_of_phases_and_nothing_else_are_kept(settings: Config, ranks: Any) -> None:
    ranks(2).run(save_steps, settings, [2, 4, 6, 8, 9, 10, 11, 12], 2)
    assert list_checkpoint_steps(settings.run_folder / "checkpoints") == [8, 11, 12]


@pytest.fixture
def two_checkpoints(settings: Config, ranks: Any) -> Path:
    ranks(2).run(save_steps, settings, [3, 6], 2)
    return settings.run_folder / "checkpoints"


def harm_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def harm_flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def harm_empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [harm_truncate, harm_flip, harm_empty, Path.unlink])
def test_any_harm_to_any_file_falls_back_and_names_the_file(two_checkpoints: Path, harm: Any) -> None:
    newest = step_folder(two_checkpoints, 6)
    spare = newest.with_name("spare")
    shutil.copytree(newest, spare)
    for path in sorted(p for p in spare.rglob("*") if p.is_file()):
        name = path.relative_to(spare)
        harm(newest / name)
        said: list[str] = []
        manifest = find_newest_valid_checkpoint(two_checkpoints, said.append)
        assert manifest is not None
        assert manifest.step == 3
        assert len(said) == 1
        assert "step 6" in said[0]
        assert name.name in said[0]
        shutil.copy2(path, newest / name)
    manifest = find_newest_valid_checkpoint(two_checkpoints, print)
    assert manifest is not None
    assert manifest.step == 6


def test_never_from_scratch_without_a_word(two_checkpoints: Path) -> None:
    for step in (3, 6):
        harm_flip(step_folder(two_checkpoints, step) / "model.safetensors")
    with pytest.raises(UserError, match="no checkpoint of this run is whole"):
        find_newest_valid_checkpoint(two_checkpoints, lambda _: None)
    assert find_newest_valid_checkpoint(two_checkpoints.parent / "none", print) is None


def test_a_manifest_of_another_format_is_not_read(two_checkpoints: Path) -> None:
    path = step_folder(two_checkpoints, 6) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    assert "format 99" in str(verify_checkpoint(path.parent))


Usage = namedtuple("Usage", "total used free")


def save_on_a_full_disk(settings: Config) -> str:
    import shutil as real

    usage, real.disk_usage = real.disk_usage, lambda _: Usage(1, 1, 1 << 20)
    try:
        save_steps(settings, [9], 2)
    except UserError as error:
        return str(error)
    finally:
        real.disk_usage = usage
    return "saved"


def test_a_nearly_full_disk_refuses_before_writing_and_keeps_the_last(
    two_checkpoints: Path, settings: Config, ranks: Any
) -> None:
    for message in ranks(2).run(save_on_a_full_disk, settings):
        assert "the disk is nearly full: saw 1 MiB free" in message
    assert list_checkpoint_steps(two_checkpoints) == [3, 6]
    assert not list(two_checkpoints.glob("*.tmp"))
    manifest = find_newest_valid_checkpoint(two_checkpoints, print)
    assert manifest is not None
    assert manifest.step == 6


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


def save_over(settings: Config, kind: str) -> str:
    """Save step 3 where something of its names lies already; what is then wrong with it."""
    checkpoints = settings.run_folder / "checkpoints"
    here = world()
    if here.is_first:
        checkpoints.mkdir(parents=True)
        for name in ("step-00000003", "step-00000003.tmp"):
            if kind == "file":
                (checkpoints / name).write_text("a file")
            else:
                (checkpoints / name).symlink_to("nowhere")
    here.barrier()
    save_steps(settings, [3], 2)
    return str(verify_checkpoint(step_folder(checkpoints, 3)))


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_step_is_saved_whatever_lies_in_its_place(settings: Config, ranks: Any, kind: str) -> None:
    for verdict in ranks(2).run(save_over, settings, kind):
        assert verdict.startswith("Manifest(")


def test_a_folder_that_cannot_be_looked_at_is_not_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    with pytest.raises(UserError, match="the checkpoints cannot be looked at"):
        find_newest_valid_checkpoint(tmp_path / "checkpoints", print)


def test_a_manifest_of_another_step_is_not_believed(two_checkpoints: Path) -> None:
    old, new = (step_folder(two_checkpoints, step) for step in (3, 6))
    shutil.rmtree(new)
    shutil.copytree(old, new)
    assert "is that of step 3" in str(verify_checkpoint(new))


def test_another_number_of_ranks_goes_on_with_the_same_rows(tmp_path: Path, ranks: Any) -> None:
    settings = tiny.load(tmp_path, "engine.ds_config=zero2", "engine.precision=bf16")
    prepare_run_data(settings)
    (losses, _, ledger), *_ = ranks(2).run(losses_after, settings, None)
    [(losses_again, _, ledger_again)] = ranks(1).run(losses_after, settings, 3)
    assert losses_again == pytest.approx(losses, rel=1e-3)
    assert ledger_again == ledger


def random_numbers(settings: Config, step: int) -> list[float]:
    """What dropout on this rank would draw after this step was restored."""
    wrapped, loader, _ = trained(settings, 0)
    restore(settings, step, wrapped, loader)
    return torch.rand(3).tolist()


def test_random_numbers_begin_afresh_on_another_number_of_ranks(settings: Config, ranks: Any) -> None:
    ranks(1).run(save_steps, settings, [3, 4], 2)
    first, second = ranks(2).run(random_numbers, settings, 3)
    assert first != second, "each rank drops other units"
    assert ranks(2).run(random_numbers, settings, 3) == [first, second], "the same start draws the same numbers"
    assert not {*first, *second} & {*ranks(2).run(random_numbers, settings, 4)[0]}, "another step draws others"


def saving_beside_training(settings: Config) -> dict[str, Any]:
    """What stands on the disk, and what is found, around a save whose writer is held up on rank 1."""
    here, checkpoints = world(), settings.run_folder / "checkpoints"
    wrapped, loader, plan = trained(settings, 1)
    writer, go = saver_of(settings, plan), threading.Event()
    write, files.write_tensors = files.write_tensors, lambda *words: (here.is_first or go.wait(60), write(*words))
    try:
        writer.start_save(1, wrapped, loader, **FACTS)
        found: dict[str, Any] = {"at once": writer.poll(), "published early": list_checkpoint_steps(checkpoints)}
        found["weights then"] = wrapped.weights(keep=True)
        run_steps(range(2, 4), settings, wrapped, loader)
        found["later"] = writer.poll()
        go.set()
        writer.finish()
    finally:
        files.write_tensors = write
    here.barrier()
    return found | {"published": list_checkpoint_steps(checkpoints)}


def test_training_goes_on_while_one_rank_still_writes(settings: Config, ranks: Any) -> None:
    for found in ranks(2).run(saving_beside_training, settings):
        assert (found["at once"], found["later"]) == (False, False), "rank 1 had not written"
        assert (found["published early"], found["published"]) == ([], [1])
        saved = load_file(step_folder(settings.run_folder / "checkpoints", 1) / "model.safetensors")
        assert all(torch.equal(saved[name], weight) for name, weight in found["weights then"].items())


def failing_to_write(settings: Config) -> list[str]:
    """The errors of a save that fails on rank 1 while rank 0 still writes, and of the next one in the same place."""
    here, said = world(), []
    wrapped, loader, plan = trained(settings, 1)
    writer, failed, go = saver_of(settings, plan), threading.Event(), threading.Event()
    write = files.write_tensors

    def slow(path: Path, tree: Any) -> None:
        go.wait(60)
        write(path, tree)

    def full(path: Path, _: Any) -> None:
        failed.set()
        raise OSError(28, "No space left on device", str(path))

    files.write_tensors = slow if here.is_first else full
    try:
        writer.start_save(9, wrapped, loader, **FACTS)
        if not here.is_first:
            assert failed.wait(60)
        here.barrier()
        time.sleep(0.2)  # an error that has been raised reaches its future
        assert not writer.poll(), "rank 0 is at work in the folder that the next save clears"
        go.set()
        writer.finish()
    except TrainingStopped as error:
        said.append(str(error))
    finally:
        files.write_tensors = write
    writer.start_save(9, wrapped, loader, **FACTS)
    writer.finish()
    return said


def test_a_rank_that_cannot_write_stops_all_and_says_what_is_left(two_checkpoints: Path, settings: Config, ranks: Any):
    for said in ranks(2).run(failing_to_write, settings):
        [line] = said
        assert "the checkpoint of step 9 could not be written (rank 1: No space left on device: " in line
        assert "the last checkpoint, of step 6, is intact" in line
    assert list_checkpoint_steps(two_checkpoints) == [3, 6, 9], (
        "a save that failed does not stand in the next one's way"
    )


def test_a_copy_on_the_host_shares_nothing_but_what_was_shared() -> None:
    tied = torch.ones(3)
    scale = SimpleNamespace(now=2)
    tree: dict[str, Any] = OrderedDict(a=[tied, {"b": tied}], scale=scale, end=(tied[:2], 7))
    copied = copy_to_host(tree, {})
    tied.zero_()
    scale.now = 3
    assert isinstance(copied, OrderedDict)
    assert copied["a"][0] is copied["a"][1]["b"]
    assert copied["a"][0].tolist() == [1, 1, 1]
    assert copied["end"][0].tolist() == [1, 1]
    assert (copied["end"][1], copied["scale"].now) == (7, 2)
