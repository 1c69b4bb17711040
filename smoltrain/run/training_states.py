"""What only training reads of a checkpoint: masters, optimizer and random states."""

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from smoltrain import files
from smoltrain.checkpoint.manifest import Manifest, list_missing_states, list_stray_files, list_training_files
from smoltrain.config.schema import Config, OptimizerSection
from smoltrain.engine.optimizer import OPTIMIZERS
from smoltrain.engine.optimizer_kind import is_elementwise_state
from smoltrain.engine.reshard import GAPS_KEY, build_shard_layout, find_state_keys
from smoltrain.errors import TrainingStopped
from smoltrain.model.interface import LanguageModel


def find_state_faults(config: Config, meta_model: LanguageModel, folder: Path, manifest: Manifest) -> list[str]:
    """What is wrong with these files of a checkpoint of such a model."""
    training = list_training_files(manifest)
    stage = manifest.zero_stage
    faults = list_missing_states(manifest) + list_stray_files(folder, manifest)
    param_shapes: Any = None  # DeepSpeed's, of the flat tensors in the shards; None where they are wrong
    for name in training.modules:
        with _collect_file_faults(name, faults):
            tree = _read_training_state(folder / name)
            module_faults = _find_module_faults(config.optimizer, meta_model, tree, stage)
            faults += [f"{name}: {fault}" for fault in module_faults]
            param_shapes = None if module_faults else tree["param_shapes"]
    for name, rank in training.shards:
        with _collect_file_faults(name, faults):
            state = _read_training_state(folder / name)["optimizer_state_dict"]
            if param_shapes is not None:
                shard_faults = find_shard_faults(state, param_shapes, stage, manifest.world_size, rank)
                faults += [f"{name}: {fault}" for fault in shard_faults]
    for name, _ in training.rng_states:
        with _collect_file_faults(name, faults):
            faults += [f"{name}: {fault}" for fault in _find_non_finite(_read_training_state(folder / name))]
    return faults


@contextlib.contextmanager
def _collect_file_faults(name: str, faults: list[str]) -> Iterator[None]:
    """What the block raises because a file of training cannot be read, or is laid out otherwise, becomes a fault."""
    try:
        yield
    except TrainingStopped as error:
        faults.append(str(error))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        faults.append(f"{name} is not laid out as DeepSpeed does it ({type(error).__name__}: {error})")


def _find_module_faults(
    optimizer: OptimizerSection, meta_model: LanguageModel, tree: dict[str, Any], stage: int
) -> list[str]:
    """What is wrong with the shapes of the optimizer states, which DeepSpeed notes in its file about the model.

    Under ZeRO-0 the states are here too, and the weights are their own masters.
    """
    faults = _find_non_finite(tree)
    trainable = {name: tuple(p.shape) for name, p in meta_model.named_parameters() if p.requires_grad}
    if stage > 0:
        flat = {name: tuple(shape) for group in tree["param_shapes"] for name, shape in group.items()}
        return faults + [f"of the optimizer states, {fault}" for fault in _find_shape_mismatches(flat, trainable)]
    kind = OPTIMIZERS[optimizer.kind]
    wants: dict[str, int] = defaultdict(int)
    for group in kind.parameter_groups(meta_model, optimizer):
        for state_name in kind.names_of_state(group):
            wants[state_name] += sum(parameter.numel() for parameter in group["params"])
    for state_name, want in wants.items():
        have = sum(x.numel() for key, x in _iterate_tensors(tree["optimizer"]) if key.endswith(f".{state_name}"))
        if have != want:
            faults.append(f"{state_name} has {have:,} elements, not {want:,}")
    return faults


def find_shard_faults(state: dict[str, Any], param_shapes: Any, stage: int, world_size: int, rank: int) -> list[str]:
    """What is wrong with one rank's masters and optimizer state. Padding may hold anything.

    `param_shapes` are DeepSpeed's, of the parameters in each flat tensor.
    """
    layout = build_shard_layout(stage, param_shapes, state.get(GAPS_KEY), world_size)
    masters, optimizer = find_state_keys(state)
    faults: list[str] = []
    for part in layout.parameter_slices(rank):
        stop = part.offset + part.stop - part.first
        tensors = {"masters": state[masters][part.tensor], **state[optimizer]["state"].get(part.tensor, {})}
        for what, value in tensors.items():
            is_elementwise = is_elementwise_state(value)
            if is_elementwise and len(value) < stop:
                faults.append(f"{what} has {len(value):,} elements, which end within {part.name}")
            elif not torch.isfinite(value[part.offset : stop] if is_elementwise else value).all():
                faults.append(f"{what} of {part.name} is not finite")
    return list(dict.fromkeys(faults))  # a counter's is met once for each parameter


def _read_training_state(path: Path) -> Any:
    """One of training's own files. Errors: TrainingStopped, as files.read_tensors."""
    from smoltrain.engine.shards import ALLOWED_SHARD_CLASSES  # imports DeepSpeed, which takes seconds

    return files.read_tensors(path, ALLOWED_SHARD_CLASSES)


def _iterate_tensors(tree: Any, key: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """(dotted key, tensor) of all tensors in nested containers."""
    if isinstance(tree, torch.Tensor):
        yield key.lstrip("."), tree
    elif isinstance(tree, dict | list | tuple):
        for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _iterate_tensors(value, f"{key}.{name}")


def _find_non_finite(tree: Any) -> list[str]:
    return [f"{key} is not finite" for key, x in _iterate_tensors(tree) if not torch.isfinite(x).all()]


def _find_shape_mismatches(have: dict[str, Any], want: dict[str, Any]) -> list[str]:
    """At most three of the parameters whose shapes are not the config's."""
    names = [name for name in want | have if have.get(name) != want.get(name)]
    return [f"{name} is {have.get(name, 'missing')}, in the config {want.get(name, 'unknown')}" for name in names[:3]]
