"""The lines by which a start says what it does."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from smoltrain.distributed.cpu_cores import CpuShare
from smoltrain.schedule import Plan
from smoltrain.train.describe import describe_completion, describe_device
from tests import tiny


def test_what_is_complete_is_a_phase_or_the_plan(tmp_path: Any) -> None:
    plan = Plan(tiny.load(tmp_path).phases)
    assert describe_completion(plan, 8) == "phase main is complete (step 8 of 12)"
    assert describe_completion(plan, 12) == "the plan is complete (12 steps)"


@pytest.mark.parametrize(
    ("size", "cuda", "words"),
    [
        (1, False, "1 CPU rank, 2 threads each, not bound, gloo; no CUDA device was found"),
        (2, True, "2 CPU ranks, 2 threads each, not bound, gloo; CUDA was not asked for"),
    ],
)
def test_the_device_is_named_with_what_else_there_is(
    monkeypatch: pytest.MonkeyPatch, size: int, cuda: bool, words: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    share = CpuShare(2, frozenset(), "not bound")
    world: Any = SimpleNamespace(device=torch.device("cpu"), size=size, cpu_share=share)
    assert describe_device(world) == words
