"""TODO: moved out of engine.py."""

import functools
import importlib
from pathlib import Path
from typing import Any

from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from smoltrain import files
from smoltrain.distributed.world import World
from smoltrain.engine.reshard import GAPS_KEY, build_shard_layout, reshard_optimizer_state, source_ranks

TORCH_SERIALIZATION_CONFIG = importlib.import_module("torch.utils.serialization.config")
SHARDS_FOLDER = "deepspeed"  # the folder of DeepSpeed's files inside a checkpoint
ALLOWED_SHARD_CLASSES = (
    LossScaler,
    DynamicLossScaler,
    ZeroStageEnum,
    fragment_address,
)  # the only classes that DeepSpeed's shards may hold


class ShardCheckpointEngine(CheckpointEngine):
    """DeepSpeed's file access: it writes nothing itself, no pickle can run code, what other ranks wrote is cut anew."""

    def __init__(self, wrapped: Any, world: World) -> None:
        self._ds, self._world = wrapped, world
        self._saved: dict[str, Any] = {}
        self.written_stage = 0
        self._model_facts: dict[str, Any] = {}  # of the model's file, what tells how the other files were cut

    def create(self, info: Any) -> None:
        """Nothing to prepare."""

    def save(self, state_dict: Any, path: str) -> None:
        """Keep what DeepSpeed would write now; a thread of checkpoint/saver.py writes it."""
        self._saved[path] = state_dict

    def take_saved(self) -> dict[str, Any]:
        """What was kept, by path; it is forgotten here."""
        taken, self._saved = self._saved, {}
        return taken

    def load(self, path: str, map_location: Any = None) -> Any:  # noqa: ARG002
        """What this rank would have written to `path`, read with weights_only. Every rank reads as many files."""
        return self._world.run_on_every_rank(lambda: self._load(path))

    def _load(self, path: str) -> Any:
        """The model's file comes first."""
        if path.endswith("_optim_states.pt"):
            return self._load_optimizer_state(Path(path))
        state = files.read_tensors(Path(path), ALLOWED_SHARD_CLASSES)
        self._model_facts = {key: state[key] for key in ("dp_world_size", "ds_config", "param_shapes")}
        state["dp_world_size"] = self._ds.dp_world_size
        if self._ds.zero_optimization_stage() != self.written_stage:  # ZeRO-3 keeps no whole weights: see load_shards
            buffers = {name: state["module"][name] for name in state["buffer_names"]}
            state["module"] = self._ds.module.state_dict() | buffers
        return state

    def _load_optimizer_state(self, path: Path) -> Any:
        old, new, rank = self._model_facts["dp_world_size"], self._ds.dp_world_size, self._ds.global_rank
        if old == new and self._model_facts["ds_config"] == self._ds.config:
            return files.read_tensors(path, ALLOWED_SHARD_CLASSES)

        @functools.cache
        def written_by(source: int) -> dict[str, Any]:
            name = f"*zero_pp_rank_{source}_mp_rank_00_optim_states.pt"  # with bf16_ in front, or not
            found = next(path.parent.glob(name))
            with TORCH_SERIALIZATION_CONFIG.patch({"load.mmap": True}):  # what is not needed of a file is not read
                return files.read_tensors(found, ALLOWED_SHARD_CLASSES)["optimizer_state_dict"]

        template, shapes = self._ds.optimizer.state_dict(), self._ds._get_zero_param_shapes()
        own = build_shard_layout(self._ds.zero_optimization_stage(), shapes, template.get(GAPS_KEY), new)
        shapes, gaps = self._model_facts["param_shapes"], written_by(0).get(GAPS_KEY)
        wrote = build_shard_layout(self.written_stage, shapes, gaps, old)
        shards = {source: written_by(source) for source in source_ranks(wrote, own, rank)}
        return {"optimizer_state_dict": reshard_optimizer_state(template, shards, wrote, own, rank)}

    def commit(self, info: Any) -> None:
        """checkpoint/saver.py publishes the folder, when every rank is done."""
