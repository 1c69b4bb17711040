"""DeepSpeed's shards: which files hold them, and how they are written, read and resharded.

They hold no weights: those lie in model.safetensors beside them, and a second copy would be read by nobody else.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from smoltrain import files
from smoltrain.distributed.world import World
from smoltrain.engine.deepspeed_json import config_precision
from smoltrain.engine.deepspeed_private import (
    CheckpointEngine,
    DynamicLossScaler,
    LossScaler,
    ZeroStageEnum,
    deepspeed,
    fragment_address,
)
from smoltrain.engine.reshard import FROZEN_KEY, GAPS_KEY, build_shard_layout, reshard_optimizer_state, source_ranks
from smoltrain.errors import Problem, UserError

TORCH_SERIALIZATION_CONFIG = importlib.import_module("torch.utils.serialization.config")
SHARDS_FOLDER = "deepspeed"  # the folder of DeepSpeed's files inside a checkpoint
# The only classes that DeepSpeed's shards may hold.
ALLOWED_SHARD_CLASSES = (LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address)


class ShardCheckpointEngine(CheckpointEngine):
    """DeepSpeed's file access: defers writes to the saver's thread, loads with weights_only, reshards other layouts."""

    def __init__(self, deepspeed_engine: Any, world: World) -> None:
        self._deepspeed = deepspeed_engine
        self._world = world
        self._saved: dict[str, Any] = {}
        # Of the checkpoint that is about to be loaded.
        self.written_stage = 0
        self.weights: Mapping[str, torch.Tensor] = {}
        self._model_facts: dict[str, Any] = {}  # of the model's file: how the optimizer's files are partitioned

    def create(self, info: Any) -> None:
        """Nothing to prepare."""

    def save(self, state_dict: Any, path: str) -> None:
        """Keep what DeepSpeed would write now, but for the weights; a thread of checkpoint/saver.py writes it."""
        kept = dict(state_dict)
        if "module" in kept:
            kept["module"] = {}
            kept[FROZEN_KEY] = None
        optimizer = kept.get("optimizer_state_dict", {})
        if "zero_stage" in optimizer:
            # Python 3.11.0 to 3.11.3 would write the enum that it is as a call of getattr, which weights_only refuses.
            kept["optimizer_state_dict"] = optimizer | {"zero_stage": int(optimizer["zero_stage"])}
        self._saved[path] = kept

    def take_saved(self) -> dict[str, Any]:
        """What was kept, by path; it is forgotten here."""
        taken = self._saved
        self._saved = {}
        return taken

    def load(self, path: str, map_location: Any = None) -> Any:  # noqa: ARG002
        """What this rank would have written to `path`, read with weights_only. Every rank reads as many files."""
        return self._world.run_on_every_rank(lambda: self._load(path))

    def _load(self, path: str) -> Any:
        """DeepSpeed asks for the model's file first."""
        if path.endswith("_optim_states.pt"):
            return self._load_optimizer_state(Path(path))
        state = files.read_tensors(Path(path), ALLOWED_SHARD_CLASSES)
        self._model_facts = {key: state[key] for key in ("dp_world_size", "ds_config", "param_shapes")}
        if self.written_stage == 0:
            self._check_whole_state(Path(path))
        state["dp_world_size"] = self._deepspeed.dp_world_size  # DeepSpeed would refuse another one
        state["module"] = self._find_module_state()
        state[FROZEN_KEY] = None  # of an older checkpoint: the frozen weights of this rank alone
        return state

    def _check_whole_state(self, path: Path) -> None:
        """ZeRO-0's state, which nobody reshards, is the fp32 weights' own, or in fp16 that of copies with a loss scale.

        Errors: UserError where the one is to be read as the other.
        """
        written = config_precision(self._model_facts["ds_config"])
        now = config_precision(self._deepspeed.config)
        if "fp16" in (written, now) and written != now:
            what = f"{path.parent.parent.name} is a ZeRO-0 checkpoint of another precision"
            raise UserError(Problem(what, saw=now, want=written, change="engine.precision"))

    def _find_module_state(self) -> dict[str, torch.Tensor]:
        """What DeepSpeed loads into the module: a tied weight under each of its names.

        ZeRO-3 keeps no whole weights and makes its parts of the masters: there only buffers are loaded, and
        `load_frozen_weights` does the rest.
        """
        module: torch.nn.Module = self._deepspeed.module
        if self._deepspeed.zero_optimization_stage() == 3:
            buffers = {name: self.weights[name] for name, _ in module.named_buffers() if name in self.weights}
            return module.state_dict() | buffers
        first_names = {id(parameter): name for name, parameter in module.named_parameters()}
        tensors = module.state_dict(keep_vars=True)
        return {name: self.weights[first_names.get(id(tensor), name)] for name, tensor in tensors.items()}

    def load_frozen_weights(self) -> None:
        """Give ZeRO-3's parts of parameters that are not trained, of which there are no masters. Collective."""
        module: torch.nn.Module = self._deepspeed.module
        frozen = {name: parameter for name, parameter in module.named_parameters() if not parameter.requires_grad}
        with deepspeed.zero.GatheredParameters(list(frozen.values()), modifier_rank=0), torch.no_grad():
            if self._world.is_first:
                for name, parameter in frozen.items():
                    parameter.copy_(self.weights[name])

    def _load_optimizer_state(self, path: Path) -> Any:
        """This rank's part: its own file if nothing has changed, else out of those that hold a piece of it."""
        old_size = self._model_facts["dp_world_size"]
        new_size = self._deepspeed.dp_world_size
        if old_size == new_size and self._model_facts["ds_config"] == self._deepspeed.config:
            return files.read_tensors(path, ALLOWED_SHARD_CLASSES)
        shard_of_rank_0 = self._read_shard(path.parent, 0)
        template = self._deepspeed.optimizer.state_dict()
        shapes = self._deepspeed._get_zero_param_shapes()
        new = build_shard_layout(self._deepspeed.zero_optimization_stage(), shapes, template.get(GAPS_KEY), new_size)
        old = build_shard_layout(
            self.written_stage, self._model_facts["param_shapes"], shard_of_rank_0.get(GAPS_KEY), old_size
        )
        rank = self._deepspeed.global_rank
        shards = {}
        for source in source_ranks(old, new, rank):
            shards[source] = self._read_shard(path.parent, source) if source else shard_of_rank_0
        return {"optimizer_state_dict": reshard_optimizer_state(template, shards, old, new, rank)}

    def _read_shard(self, folder: Path, rank: int) -> dict[str, Any]:
        """The optimizer state that a rank wrote."""
        name = f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"  # with bf16_ in front, or not
        path = next(folder.glob(name))
        with TORCH_SERIALIZATION_CONFIG.patch({"load.mmap": True}):  # what is not needed of a file is not read
            return files.read_tensors(path, ALLOWED_SHARD_CLASSES)["optimizer_state_dict"]

    def commit(self, info: Any) -> None:
        """checkpoint/saver.py publishes the folder, when every rank is done."""
