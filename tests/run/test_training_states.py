"""The padding of shards; what else can be wrong with the states of training: test_verify.py."""

import math

import torch

from smoltrain.engine.reshard import MASTER_KEYS, OPTIMIZER_KEYS, build_shard_layout
from smoltrain.run.training_states import find_shard_faults


def test_padding_may_hold_anything():
    shapes, world, rank = [{"matrix": torch.Size((3, 7)), "vector": torch.Size((32,))}], 3, 2
    wrote = build_shard_layout(3, shapes, None, world)  # the vector is dealt out as 11, 11 and 10
    flat = torch.full((wrote.shard_size(0),), math.nan)
    flat[:17] = 1.0
    state = {MASTER_KEYS[1]: [flat], OPTIMIZER_KEYS[1]: {"state": {0: {"exp_avg": flat, "step": torch.ones(())}}}}
    assert find_shard_faults(state, shapes, 3, world, rank) == []
    flat[16] = math.nan
    assert find_shard_faults(state, shapes, 3, world, rank) == [
        "masters of vector is not finite", "exp_avg of vector is not finite",
    ]  # fmt: skip
