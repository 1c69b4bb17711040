"""The files of a folder's weights: one model.safetensors or its shards, written, read whole, and held to a config."""

import functools
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from smoltrain.data.tokenizers.companions import read_json_object
from smoltrain.errors import Problem, UserError, exception_message, format_value
from smoltrain.files import give_default_mode

Tensors = dict[str, Tensor]

WEIGHT_INDEX = "model.safetensors.index.json"  # names the shards of weights that are not one model.safetensors


def check_hf_tensors(want: dict[str, torch.Size], have: Tensors, where: Path) -> None:
    """Errors: UserError with up to five problems: a tensor that is missing or unknown, its shape, dtype, no numbers."""
    problems: list[Problem] = []
    for name in sorted(want.keys() - have.keys()):
        problems.append(Problem("a tensor is missing", f"no {name}", str(tuple(want[name])), str(where)))
    for name, x in sorted(have.items()):
        if name not in want:
            problems.append(Problem("a tensor is unknown", name, "the tensors of the config alone", str(where)))
        elif x.shape != want[name]:
            is_table = "embed" in name or ".wte." in name or name.startswith("lm_head")
            kind = "vocabulary" if is_table and x.shape[1:] == want[name][1:] else "shape"
            wanted = f"{tuple(want[name])} as the config says"
            problems.append(Problem(f"{name} has another {kind}", str(tuple(x.shape)), wanted, str(where)))
        elif x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            wanted = "float32, bfloat16 or float16"
            problems.append(Problem(f"{name} has another dtype", str(x.dtype), wanted, str(where)))
        elif not x.isfinite().all():
            problems.append(
                Problem(f"{name} holds values that are no numbers", "nan or inf", "finite ones", str(where))
            )
    if problems:
        raise UserError(*problems[:5])


def write_safetensors_file(file: Path, tensors: Tensors) -> None:
    """Write a file that transformers reads, too. safetensors 0.8 makes it one that nobody else may read."""
    save_file(tensors, file, metadata={"format": "pt"})
    give_default_mode(file)


def read_safetensors_file(file: Path) -> Tensors:
    """All tensors of a file. Errors: UserError if it is missing or not whole."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        reason = exception_message(error)
        raise UserError(Problem("the weights cannot be read", reason, "a whole .safetensors file", str(file))) from None


def read_hf_weights(folder: Path) -> Tensors:
    """The tensors of model.safetensors, or of all shards that the index names."""
    if (folder / "model.safetensors").is_file():
        return read_safetensors_file(folder / "model.safetensors")
    if not (folder / WEIGHT_INDEX).is_file():
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        saw = f"{pickles[0]}, a pickle, which could run code" if pickles else "neither of the two"
        raise UserError(Problem("the folder has no weights", saw, f"model.safetensors or {WEIGHT_INDEX}", str(folder)))
    names = read_json_object(folder / WEIGHT_INDEX).get("weight_map")
    shards = sorted(set(map(str, names.values()))) if isinstance(names, dict) else []
    if not shards or any(Path(shard).name != shard for shard in shards):
        saw, want = format_value(shards), "a weight_map that names files of the folder"
        raise UserError(Problem("the index of the weights is damaged", saw, want, str(folder / WEIGHT_INDEX)))
    tensors: Tensors = {}
    for shard in shards:
        tensors |= read_safetensors_file(folder / shard)
    return tensors


def common_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype that holds all of them exactly."""
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors))
