"""What a rank hands to torch.distributed, as torch dispatches it: by whom ever it was called."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# gloo reduce-scatters by an all-reduce.
ROUNDS = {"allreduce_": 2, "_reduce_scatter_base_": 2, "_allgather_base_": 1}


class CollectiveBytes(TorchDispatchMode):
    """Counts while it is entered: `whole` has the bytes of the whole tensors, by collective."""

    def __init__(self) -> None:
        super().__init__()
        self.whole: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
            self.whole[str(func).split(".")[1]] += max(tensor.nbytes for tensor in tensors)
        return func(*args, **(kwargs or {}))

    def sent(self, ranks: int) -> float:
        """By one rank around a ring."""
        return sum(ROUNDS[name] * num_bytes * (ranks - 1) / ranks for name, num_bytes in self.whole.items())
