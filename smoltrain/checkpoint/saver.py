"""Saving beside training: the loop waits for a copy in host memory, a thread of each rank writes and hashes its files.

start_save  copy the state; the threads start                     every rank
poll        at each later step: has every rank written?           every rank
publish     manifest.json, fsync, rename, fsync of the parent     rank 0, at the first step boundary where all have

Ranks talk at step boundaries alone, so that no thread needs a process group of its own. Whatever dies before the rename
leaves a folder that is called .tmp, and all older checkpoints as they were.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from smoltrain import files
from smoltrain.checkpoint.free_space import check_free_space, is_private, name_machine
from smoltrain.checkpoint.host_copies import HostCopies
from smoltrain.checkpoint.identity import RunIdentity
from smoltrain.checkpoint.manifest import (
    MANIFEST_FORMAT,
    WEIGHTS_FILE,
    FileRecord,
    Manifest,
    describe_last_checkpoint,
    step_folder,
    write_last_saved_step,
    write_manifest,
)
from smoltrain.checkpoint.restore import capture_rng_state, rng_file_name
from smoltrain.checkpoint.retention import delete_checkpoint, delete_path, prune_checkpoints
from smoltrain.checkpoint.written_files import find_unseen_file
from smoltrain.config.schema import CheckpointSection
from smoltrain.data.rows.loader import Loader, merge_loader_states
from smoltrain.distributed.file_transfer import copy_file
from smoltrain.distributed.world import World
from smoltrain.errors import Problem, TrainingStopped, UserError
from smoltrain.model.hf_weights import write_safetensors_file
from smoltrain.schedule import Plan

if TYPE_CHECKING:  # who only reads checkpoints needs no DeepSpeed
    from smoltrain.engine.engine import Engine

POLL_S = 5.0  # between two questions to all ranks whether they have written


@dataclass(frozen=True)
class PendingCheckpoint:
    """A checkpoint that is being written."""

    manifest: Manifest  # without its files
    temporary_folder: Path
    began_at: float  # time.perf_counter()
    pause_s: float  # that training waited for the copy, the slowest rank
    records: "Future[dict[str, FileRecord]]"  # of this rank's files


class CheckpointSaver:
    """Writes checkpoints, one at a time. All methods but `close` are collective: every rank must call them."""

    def __init__(
        self, checkpoints: Path, world: World, plan: Plan, section: CheckpointSection,
        *, say: Callable[[str], None] = print, published: Callable[[int, Path], None] = lambda *_: None,
    ) -> None:  # fmt: skip
        """`published` is called on every rank with step and folder of each checkpoint that was published."""
        self._checkpoints = checkpoints
        self._world = world
        self._plan = plan
        self._section = section
        self._say = say
        self._published = published
        self._copies = HostCopies(world.device)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pruning: Future[list[str]] | None = None  # on rank 0
        self._reported_leftovers: set[str] = set()  # what could not be deleted is said once
        self._pending: PendingCheckpoint | None = None
        self._is_private = is_private(world, section)

    def start_save(
        self, step: int, engine: "Engine", loader: Loader, *, precision: str, skipped_updates: int, wandb_id: str,
        identity: RunIdentity, validation_loss: float | None, validation_rows: int,
    ) -> float:  # fmt: skip
        """Copy the state of this step and start to write it; seconds that training was paused, the slowest rank's.

        The keywords are fields of the Manifest. A checkpoint that is still being written is waited for first. Where
        checkpoint.background is false, this one is published before this returns.
        Errors: UserError before anything is written, when the disk cannot hold it; those of `poll`.
        """
        began = time.perf_counter()
        self.finish()
        temporary = step_folder(self._checkpoints, step).with_suffix(".tmp")
        needed = engine.checkpoint_bytes
        machine = name_machine(self._world)
        self._world.run_on_first_rank(lambda: _prepare_folder(self._checkpoints, temporary, needed, machine))
        if self._is_private:
            share = needed // self._world.num_machines
            self._world.run_on_every_rank(lambda: self._prepare_own_folder(temporary, share))
        state = merge_loader_states(self._world.gather(loader.state()))
        trees = engine.training_state(temporary) | {rng_file_name(self._world.rank): capture_rng_state(self._world)}
        self._copies.begin(trees)
        tensors = self._copies.copy_tree(trees)
        weights = engine.weights(keep=self._world.is_first, copy=self._copies.copy_tensor)
        self._copies.wait()  # until here `trees` must be alive: a copy is known by the address of its tensor
        records = self._thread.submit(_write_rank_files, temporary, tensors, weights, engine.checkpoint_classes)
        [pause_s] = self._world.max_floats(time.perf_counter() - began)
        manifest = Manifest(
            format=MANIFEST_FORMAT, step=step, phase=self._plan.phase(step).name, world_size=self._world.size,
            zero_stage=engine.stage, precision=precision, loader=state, skipped_updates=skipped_updates,
            wandb_id=wandb_id, identity=identity, validation_loss=validation_loss, validation_rows=validation_rows,
            files={},
        )  # fmt: skip
        self._pending = PendingCheckpoint(manifest, temporary, began, pause_s, records)
        if not self._section.background:
            self.finish()
            [pause_s] = self._world.max_floats(time.perf_counter() - began)
        return pause_s

    def poll(self) -> bool:
        """Publish the pending checkpoint if every rank has written it; True when nothing is pending.

        Errors: TrainingStopped on every rank when one could not write, once no other writes either: whoever saves next
        clears the folder, and no writer may be at work in it then.
        """
        if self._pending is None:
            return True
        is_done = self._pending.records.done()
        error = self._pending.records.exception() if is_done else None
        num_failed, num_unfinished = self._world.sum_ints(error is not None, not is_done)
        if num_unfinished:
            return False
        if num_failed:
            reasons = self._world.gather(files.describe_error(error) if error else None)
            message = self._world.run_on_first_rank(lambda: self._failure_message(reasons))
            self._pending = None
            raise TrainingStopped(message)
        try:
            self._publish(self._pending)
        finally:
            self._pending = None  # what could not be published is not tried again
        return True

    def finish(self) -> None:
        """Wait until nothing is pending and superseded checkpoints are deleted. Errors: those of `poll`."""
        while not self.poll():
            assert self._pending is not None
            wait([self._pending.records], POLL_S)
        if self._pruning:
            for line in self._pruning.result():
                if line not in self._reported_leftovers:
                    self._say(line)
                    self._reported_leftovers.add(line)
            self._pruning = None

    def close(self) -> None:
        """Give up what is still being written."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _publish(self, pending: PendingCheckpoint) -> None:
        records: dict[str, FileRecord] = {}
        everyones = self._world.gather(pending.records.result())
        for rank_records in everyones:
            records |= rank_records
        manifest = replace(pending.manifest, files=dict(sorted(records.items())))
        final = step_folder(self._checkpoints, manifest.step)
        temporary = pending.temporary_folder
        began_to_send = time.perf_counter()
        faults = self._collect_files(temporary, everyones) if self._is_private else []
        [sending_s] = self._world.max_floats(time.perf_counter() - began_to_send)

        def publish() -> None:
            if any(faults):
                raise TrainingStopped(self._failure_message(faults))
            unseen = [self._find_unseen(temporary, rank, written) for rank, written in enumerate(everyones)]
            if any(unseen):
                raise TrainingStopped(self._failure_message(unseen))
            try:
                for folder in {(temporary / name).parent for name in records}:
                    files.fsync_path(folder)
                write_manifest(temporary, manifest)  # syncs its folder too
                if os.path.lexists(final):  # the same step again: the one that is there did not verify
                    delete_checkpoint(final)
                files.commit_file(temporary, final)
                write_last_saved_step(self._checkpoints, manifest.step)
            except OSError as error:
                raise TrainingStopped(self._failure_message([files.describe_error(error)])) from None
            self._pruning = self._thread.submit(
                prune_checkpoints, self._checkpoints, manifest.step, self._plan, self._section
            )

        self._world.run_on_first_rank(publish)
        took_s = time.perf_counter() - pending.began_at
        if self._is_private and self._world.is_first_of_machine and not self._world.is_first:
            delete_path(temporary)  # rank 0's machine has it all
        pause_s = pending.pause_s + sending_s if self._section.background else took_s
        self._say(f"checkpoint step {manifest.step}: paused {pause_s:.1f} s, published after {took_s:.1f} s")
        self._published(manifest.step, final)

    def _prepare_own_folder(self, temporary: Path, needed: int) -> None:
        """On a machine that has a folder of its own. Errors: those of `_prepare_folder`."""
        if self._world.is_first_of_machine and not self._world.is_first:
            _prepare_folder(self._checkpoints, temporary, needed, name_machine(self._world))

    def _collect_files(self, temporary: Path, everyones: list[dict[str, FileRecord]]) -> list[str | None]:
        """Send to rank 0 what ranks of other machines have written; on rank 0, what could not be taken of each."""
        machines = self._world.machines
        faults: list[str | None] = [None] * self._world.size
        for rank, written in enumerate(everyones):
            if machines[rank] == machines[0] or self._world.rank not in (0, rank):
                continue
            for name in written:
                fault = copy_file(self._world, temporary / name, rank, 0)
                faults[rank] = faults[rank] or fault
        return faults

    def _find_unseen(self, temporary: Path, rank: int, written: dict[str, FileRecord]) -> str | None:
        """What rank 0 does not see of a rank's files, and whose folder that is. Rank 0 calls this."""
        unseen = find_unseen_file(temporary, written)
        if unseen is None:
            return None
        hosts = self._world.hosts
        return f"it has written on {hosts[rank]} what {hosts[0]} does not see: {unseen}"

    def _failure_message(self, reasons: list[str | None]) -> str:
        """What went wrong on which ranks, and what is left. One rank calls this."""
        assert self._pending is not None
        wrong = "; ".join(f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason)
        what = f"the checkpoint of step {self._pending.manifest.step} could not be written ({wrong})"
        left = describe_last_checkpoint(self._checkpoints)
        return f"{what}; {left}; mend the cause, then the same command goes on from there"


def _write_rank_files(
    folder: Path, tensors: dict[str, Any], weights: dict[str, torch.Tensor], classes: Sequence[type]
) -> dict[str, FileRecord]:
    """Write this rank's files, which hold tensors and these classes; sizes and hashes by name. Runs in a thread."""
    for name, tree in tensors.items():
        files.write_tensors(folder / name, tree, classes)
    names = list(tensors)
    if weights:
        names.append(WEIGHTS_FILE)
        write_safetensors_file(folder / WEIGHTS_FILE, weights)
        files.fsync_path(folder / WEIGHTS_FILE)
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": files.file_sha256(folder / name)} for name in names
    }


def _prepare_folder(checkpoints: Path, temporary: Path, needed: int, machine: str) -> None:
    """Make the temporary folder. Errors: UserError if the disk cannot hold `needed` bytes, or cannot be written."""
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        delete_path(temporary)
        check_free_space(checkpoints.parent, needed, machine)
        temporary.mkdir()
    except OSError as error:
        what = "checkpoints cannot be written there"
        want = f"a folder that this user may write; {describe_last_checkpoint(checkpoints)}"
        raise UserError(Problem(what, files.describe_error(error) + machine, want, str(checkpoints))) from None
