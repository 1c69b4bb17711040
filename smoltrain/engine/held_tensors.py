"""Which tensors of this rank hold memory, and what they are: the parts of training, and whatever else Python can see.

What autograd keeps of a forward pass lies in C++ where nobody can list it: of activations only those are found that a
Python object still names.
"""

import gc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

OTHER = "other"  # than weights, gradients and optimizer


@dataclass(frozen=True)
class HeldTensors:
    """Tensors that are alike."""

    part: str  # weights, gradients, optimizer or other
    shape: tuple[int, ...]
    dtype: str
    count: int
    num_bytes: int  # of all of them


def list_engine_tensors(deepspeed_engine: Any, sums: Iterable[Tensor]) -> dict[str, list[Tensor]]:
    """Weights, gradients, masters with the optimizer's state; the parts of the estimate. `sums`: of gradients."""
    optimizer = deepspeed_engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)  # DeepSpeed wraps it, but under ZeRO-0
    module: torch.nn.Module = deepspeed_engine.module
    weights = [*module.parameters(), *module.buffers()]
    weights += [parameter.ds_tensor for parameter in weights if hasattr(parameter, "ds_tensor")]  # ZeRO-3's own part
    updated = [parameter for group in inner.param_groups for parameter in group["params"]]
    updated += getattr(optimizer, "fp32_partitioned_groups_flat", [])  # ZeRO-3 shows its optimizer a part at a time
    states = [value for state in inner.state.values() for value in state.values() if isinstance(value, Tensor)]
    gradients = [p.grad for p in (*weights, *updated) if p.is_leaf and p.grad is not None]
    for held in (getattr(optimizer, "averaged_gradients", None), getattr(optimizer, "fp32_groups_gradients_flat", [])):
        lists = held.values() if isinstance(held, dict) else (held or ())
        for tensors in lists:
            gradients += [tensors] if isinstance(tensors, Tensor) else [one for one in tensors or () if one is not None]
    return {"weights": weights, "gradients": [*gradients, *sums], "optimizer": [*updated, *states]}


def list_held_tensors(parts: Mapping[str, Iterable[Tensor]], device: torch.device) -> list[HeldTensors]:
    """Everything on this device that a Python object names, alike tensors together, the largest first.

    A tensor counts with all its storage, and once, though several views of it may be there; the first of the `parts`
    that has a view of it names it.
    """
    owners: dict[int, tuple[str, Tensor]] = {}
    found = [(part, tensor) for part, tensors in parts.items() for tensor in tensors]
    found += [(OTHER, thing) for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    for part, tensor in found:
        if tensor.device.type != device.type or tensor.layout != torch.strided or isinstance(tensor, FakeTensor):
            continue  # the compiler's have no memory
        address = tensor.untyped_storage().data_ptr()
        known = owners.get(address)
        if known is None or (known[0] == part and tensor.numel() > known[1].numel()):
            owners[address] = (part, tensor)
    alike: dict[tuple[str, tuple[int, ...], str], list[int]] = {}
    for part, tensor in owners.values():
        kind = (part, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        alike.setdefault(kind, []).append(tensor.untyped_storage().nbytes())
    held = [HeldTensors(*kind, len(sizes), sum(sizes)) for kind, sizes in alike.items()]
    return sorted((one for one in held if one.num_bytes), key=lambda one: -one.num_bytes)


def sum_by_part(held: Iterable[HeldTensors]) -> dict[str, int]:
    """Bytes of each part."""
    sums: dict[str, int] = {}
    for one in held:
        sums[one.part] = sums.get(one.part, 0) + one.num_bytes
    return sums
