"""What holds memory: each storage once, under the part of training that it belongs to, under every ZeRO stage."""

from pathlib import Path
from typing import Any

import pytest
import torch

from smoltrain.data.rows.batch import Batch
from smoltrain.engine.held_tensors import OTHER, HeldTensors, list_held_tensors, sum_by_part
from tests.engines import ROWS, T, V, engine_of, settings_of, train

N = 147  # parameters of the odd model that are trained
W = N + 30  # all of its weights
PADDING = 1.2  # DeepSpeed pads partitions
CPU = torch.device("cpu")


def held_between_backward_and_update(folder: Path, stage: int, precision: str, by: str) -> dict[str, int]:
    engine = engine_of(settings_of(folder, stage, precision, by), seed=3)
    train(engine, 1, 1)
    ids = torch.randint(V, (1, T + 1), generator=torch.Generator().manual_seed(5))
    for _ in range(ROWS // 2):
        engine.backward(engine.forward(Batch(ids.int())) / ROWS)
    return sum_by_part(list_held_tensors(engine.list_tensors(), CPU))


@pytest.mark.parametrize(
    ("stage", "precision", "by", "weights", "gradients", "optimizer"),
    [
        (0, "fp32", "auto", 4 * W, 4 * N, 8 * N),  # the weights are the masters
        (1, "bf16", "micro_batch", 2 * W, (4 + 2) * N, 12 * N / 2),
        (2, "bf16", "step", 2 * W, 4 * N, 12 * N / 2),
        (2, "bf16", "micro_batch", 2 * W, 4 * N / 2, 12 * N / 2),
        # A part of the weights, and all of them: so small ones stay gathered.
        (3, "bf16", "auto", 2 * W / 2 + 2 * W, 4 * N / 2, 12 * N / 2),
    ],
)
def test_parts_of_two_ranks(
    ranks: Any, tmp_path: Path, stage: int, precision: str, by: str, weights: float, gradients: float, optimizer: float
) -> None:
    for held in ranks(2).run(held_between_backward_and_update, tmp_path, stage, precision, by):
        assert weights <= held["weights"] <= PADDING * weights + 64
        assert gradients <= held["gradients"] <= PADDING * gradients + 64
        assert optimizer <= held["optimizer"] <= PADDING * optimizer + 64


def test_views_count_once_and_alike_tensors_together() -> None:
    whole = torch.zeros(1000, 7)
    views = [whole[:10], whole.view(7, 1000), whole]
    twins = [torch.zeros(3, 1001, dtype=torch.bfloat16) for _ in range(2)]
    found = list_held_tensors({"weights": views}, CPU)
    assert HeldTensors("weights", (7, 1000), "float32", 1, 28_000) in found
    assert sum_by_part(found)["weights"] == 28_000
    assert HeldTensors(OTHER, (3, 1001), "bfloat16", len(twins), 2 * 6006) in found
    assert [one.num_bytes for one in found] == sorted((one.num_bytes for one in found), reverse=True)
