"""Checkpoints in one process pair: whole or not there, written beside training."""

import threading
import time
from collections import namedtuple
from pathlib import Path
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
from smoltrain.config.schema import Config
from smoltrain.errors import TrainingStopped, UserError
from tests.checkpoint.saving import FACTS, run_steps, save_steps, saver_of, trained
from tests.folders import list_closed_files
from tests.ranks import world


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
    assert list_closed_files(folder) == [], "colleagues read what the umask lets them read"


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

    def slow(*words: Any) -> None:
        go.wait(60)
        write(*words)

    def full(path: Path, *_: Any) -> None:
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
