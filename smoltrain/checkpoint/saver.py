"""Saving beside training: the loop waits for a copy in host memory, a thread of each rank writes and hashes its files.

begin    copy the state; the threads start                       every rank
poll     at each later step: has every rank written?             every rank
publish  manifest.json, fsync, rename, fsync of the parent       rank 0, at the first step boundary where all have

Ranks talk at step boundaries alone, so that no thread needs a process group of its own. Whatever dies before the rename
leaves a folder that is called .tmp, and all older checkpoints as they were.
"""

import copy
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from smoltrain import files
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
from smoltrain.config.schema import CheckpointSection
from smoltrain.data.rows.loader import Loader, merge_loader_states
from smoltrain.distributed.world import World
from smoltrain.errors import Problem, TrainingStopped, UserError
from smoltrain.schedule import Plan

if TYPE_CHECKING:  # who only reads checkpoints needs no DeepSpeed
    from smoltrain.engine.engine import Engine

SPARE_BYTES = 64 << 20  # left free beside a checkpoint, for logs and W&B
POLL_S = 5.0  # between two looks at the writers of all ranks


@dataclass(frozen=True)
class PendingCheckpoint:
    """A checkpoint in the making."""

    manifest: Manifest  # but for its files
    temporary_folder: Path
    began_at: float  # time.perf_counter()
    pause_s: float
    records: "Future[dict[str, FileRecord]]"  # of this rank's files


class CheckpointSaver:
    """Writes checkpoints, one at a time. All methods are collective: every rank must call them."""

    def __init__(
        self, checkpoints: Path, world: World, plan: Plan, section: CheckpointSection,
        *, say: Callable[[str], None] = print, published: Callable[[int, Path], None] = lambda *_: None,
    ) -> None:  # fmt: skip
        """`published` is called on every rank with the step and the folder of a checkpoint that is there from now."""
        self._checkpoints, self._world, self._plan, self._section = checkpoints, world, plan, section
        self._say, self._published = say, published
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pruning: Future[list[str]] | None = None  # on rank 0
        self._reported_leftovers: set[str] = set()  # what it could not delete is said once
        self._writing: PendingCheckpoint | None = None

    def start_save(self, step: int, engine: "Engine", loader: Loader, **facts: Any) -> float:
        """Copy the state of this step and start to write it; seconds that training stood still, the slowest rank's.

        `facts` are the Manifest's remaining fields. One that is still being written is waited for. Where
        checkpoint.background is false this one is published at the end.
        Errors: UserError before anything is written, when the disk cannot hold it; those of `poll`.
        """
        began = time.perf_counter()
        self.finish()
        final = step_folder(self._checkpoints, step)
        aside = final.with_name(final.name + ".tmp")
        self._world.run_on_first_rank(lambda: _prepare_folder(self._checkpoints, aside, engine.checkpoint_bytes()))
        state = merge_loader_states(self._world.gather(loader.state()))
        known: dict[Any, torch.Tensor] = {}
        tensors = engine.training_state(aside) | {rng_file_name(self._world.rank): capture_rng_state()}
        tensors = {name: copy_to_host(tree, known) for name, tree in tensors.items()}
        weights = engine.weights(keep=self._world.is_first)
        records = self._thread.submit(_write_rank_files, aside, tensors, weights)
        [pause_s] = self._world.max_floats(time.perf_counter() - began)
        manifest = Manifest(
            format=MANIFEST_FORMAT, step=step, phase=self._plan.phase(step).name, world_size=self._world.size,
            zero_stage=engine.stage, loader=state, files={}, **facts,
        )  # fmt: skip
        self._writing = PendingCheckpoint(manifest, aside, began, pause_s, records)
        if not self._section.background:
            self.finish()
            [pause_s] = self._world.max_floats(time.perf_counter() - began)
        return pause_s

    def poll(self) -> bool:
        """Publish what every rank has written; whether nothing is left in the making.

        Errors: TrainingStopped on every rank when one could not write, once no other writes either: whoever saves next
        clears the folder, and no writer may be at work in it then.
        """
        if self._writing is None:
            return True
        done = self._writing.records.done()
        error = self._writing.records.exception() if done else None
        failed, unfinished = self._world.sum_ints(error is not None, not done)
        if unfinished:
            return False
        if failed:
            self._raise_write_failure(self._world.gather(files.describe_error(error) if error else ""))
        self._publish(self._writing)
        self._writing = None
        return True

    def finish(self) -> None:
        """Wait until nothing is in the making, and nothing on its way out. Errors: those of `poll`."""
        while not self.poll():
            assert self._writing is not None
            wait([self._writing.records], POLL_S)
        if self._pruning:
            left_over = self._pruning.result()
            for line in (line for line in left_over if line not in self._reported_leftovers):
                self._say(line)
            self._reported_leftovers.update(left_over)
            self._pruning = None

    def close(self) -> None:
        """What is still being written is given up."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _publish(self, writing: PendingCheckpoint) -> None:
        records = self._world.gather(writing.records.result())
        whole = {name: record for part in records for name, record in part.items()}
        manifest = replace(writing.manifest, files=dict(sorted(whole.items())))
        final = step_folder(self._checkpoints, manifest.step)

        def publish() -> None:
            try:
                for folder in {(writing.temporary_folder / name).parent for name in whole}:
                    files.fsync_path(folder)
                write_manifest(writing.temporary_folder, manifest)  # syncs its folder too
                if os.path.lexists(final):  # the same step again: the one that is there did not verify
                    delete_checkpoint(final)
                files.commit_file(writing.temporary_folder, final)
                write_last_saved_step(self._checkpoints, manifest.step)
            except OSError as error:
                raise TrainingStopped(self._failure_message([files.describe_error(error)])) from None
            self._pruning = self._thread.submit(
                prune_checkpoints, self._checkpoints, manifest.step, self._plan, self._section
            )

        self._world.run_on_first_rank(publish)
        took_s = time.perf_counter() - writing.began_at
        beside = f"training stood still for {writing.pause_s:.1f} s, the files were there {took_s:.1f} s after it began"
        self._say(f"checkpoint {final}: {beside if self._section.background else f'training waited {took_s:.1f} s'}")
        self._published(manifest.step, final)

    def _raise_write_failure(self, reasons: list[str]) -> None:
        """Errors: TrainingStopped on every rank, always."""
        line = self._world.run_on_first_rank(lambda: self._failure_message(reasons))
        self._writing = None
        raise TrainingStopped(line)

    def _failure_message(self, reasons: list[str]) -> str:
        """What went wrong, and what is left. One rank calls this."""
        assert self._writing is not None
        wrong = "; ".join(f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason)
        step = self._writing.manifest.step
        what = f"the checkpoint of step {step} could not be written ({wrong})"
        left = describe_last_checkpoint(self._checkpoints)
        return f"{what}; {left}; mend the cause, then the same command goes on from there"


def copy_to_host(tree: Any, known: dict[Any, torch.Tensor]) -> Any:
    """A copy whose tensors are on the host, so that training may go on.

    A tensor that comes again, as tied weights do, is copied once: `known` remembers, by device, place and shape.
    """
    if isinstance(tree, torch.Tensor):
        place = (tree.device, tree.data_ptr(), tree.dtype, tree.shape, tree.stride())
        if place not in known:
            known[place] = tree.detach().to("cpu", copy=True)
        return known[place]
    if isinstance(tree, dict):
        copied = copy.copy(tree)  # of its own kind
        copied.update({key: copy_to_host(value, known) for key, value in tree.items()})
        return copied
    if type(tree) in (list, tuple):
        return type(tree)(copy_to_host(value, known) for value in tree)
    return copy.deepcopy(tree)  # numbers, and DeepSpeed's loss scaler, which changes


def _write_rank_files(folder: Path, tensors: dict[str, Any], weights: dict[str, torch.Tensor]) -> dict[str, FileRecord]:
    """Write this rank's files; their sizes and hashes by name. Runs in a thread."""
    for name, tree in tensors.items():
        files.write_tensors(folder / name, tree)
    names = list(tensors)
    if weights:
        names.append(WEIGHTS_FILE)
        save_file(weights, folder / WEIGHTS_FILE)
        files.fsync_path(folder / WEIGHTS_FILE)
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": files.file_sha256(folder / name)} for name in names
    }


def _prepare_folder(checkpoints: Path, aside: Path, needed: int) -> None:
    """Make the folder, and refuse if the disk would overflow."""
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        delete_path(aside)
        free = shutil.disk_usage(checkpoints).free
        if free < needed + SPARE_BYTES:
            left = describe_last_checkpoint(checkpoints)
            want = f"{(needed + SPARE_BYTES) / 2**20:,.0f} MiB for the next checkpoint; {left}"
            raise UserError(Problem("the disk is nearly full", f"{free / 2**20:,.0f} MiB free", want, str(checkpoints)))
        aside.mkdir()
    except OSError as error:
        what, want = (
            "checkpoints cannot be written there",
            f"a folder that this user may write; {describe_last_checkpoint(checkpoints)}",
        )
        raise UserError(Problem(what, files.describe_error(error), want, str(checkpoints))) from None
