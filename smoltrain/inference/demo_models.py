"""The checkpoints of the demo: which there are, and those that are in memory."""

from collections.abc import Sequence
from threading import Lock
from typing import NamedTuple

import torch

from smoltrain.checkpoint.manifest import Manifest, list_checkpoint_steps, read_manifest, step_folder
from smoltrain.distributed.world import choose_device
from smoltrain.inference.load import LoadedModel, load_trained_model


class ListedCheckpoint(NamedTuple):
    """One that a run has, unread but for its manifest."""

    step: int
    validation_loss: float | None  # nats per token; None where there was no evaluation at this very step


class DemoModels:
    """Loads a run's checkpoints (or one Hugging Face folder) on demand, and keeps those that wrote last."""

    def __init__(self, run: str) -> None:
        """Load the newest valid checkpoint. Errors: UserError, as load_trained_model."""
        self.device = choose_device("mps" if torch.backends.mps.is_available() else "auto")
        self._run = run
        self._lock = Lock()  # who stops while a model is being loaded leaves that work behind, still under way
        self._kept = [self._load_to_device(None)]
        self._checkpoints = self._kept[0].folder / "checkpoints"

    def list_checkpoints(self) -> list[ListedCheckpoint]:
        """Those that there are now, newest first: a run under way adds and deletes some."""
        found: list[ListedCheckpoint] = []
        for step in reversed(list_checkpoint_steps(self._checkpoints)):
            manifest = read_manifest(step_folder(self._checkpoints, step))
            loss = manifest.validation_loss if isinstance(manifest, Manifest) else None
            found.append(ListedCheckpoint(step, loss))
        return found

    def load(self, steps: Sequence[int] = ()) -> list[LoadedModel]:
        """The models of these steps, or those that are kept. Errors: UserError, as load_trained_model."""
        with self._lock:
            if steps:
                kept = {loaded.step: loaded for loaded in self._kept}
                self._kept = [kept.get(step) or self._load_to_device(step) for step in steps]
            return list(self._kept)

    def _load_to_device(self, step: int | None) -> LoadedModel:
        loaded = load_trained_model(self._run, step)
        loaded.model.to(self.device)
        return loaded


def describe_checkpoint(step: int, validation_loss: float | None) -> str:
    """The step, and the validation loss where there is one."""
    loss = "" if validation_loss is None else f" · validation loss {validation_loss:.4f}"
    return f"step {step:,}{loss}"
