"""Signs of life that are ranges of a trace: one after the other, the layers inside, in the requested steps alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from smoltrain.profiling.trace import HOST_GAPS, RECOMPUTED, flatten_ranges, read_trace
from smoltrain.training.step_recorder import (
    OTHER_RANKS,
    PROFILE_VARIABLE,
    ProfileRequest,
    RecordingWatchdog,
    name_layers,
    open_watchdog,
)
from smoltrain.training.watchdog import Watchdog


class World:
    rank, size, is_first = 0, 1, True


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = torch.nn.LayerNorm(4)
        self.mlp = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.input_layernorm(x))


def test_the_requested_steps_are_cut_at_every_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = tmp_path / "trace.json.gz"
    monkeypatch.setenv(PROFILE_VARIABLE, ProfileRequest(2, 3, str(trace)).to_text())
    world: Any = World()
    watchdog = open_watchdog(tmp_path, world, 0.0, frozenset())
    assert isinstance(watchdog, RecordingWatchdog)
    block = Block()
    name_layers(block)
    y = torch.zeros(())
    for step in (1, 2, 2, 3, 4):  # the second one was skipped, and tried again
        watchdog.begin_step(step)
        for place in ("data", "reduction", "forward", "backward", "reduction", "update"):
            watchdog.mark(place)
            if place == "forward":
                # As a recomputed block ends: by an exception in its last layer, when all that is needed is there.
                y = checkpoint(block, torch.ones(2, 4, requires_grad=True), use_reentrant=False)
            if place == "backward":
                y.sum().backward()
    assert watchdog.place == (4, "update")
    ranges = [event for event in read_trace(trace) if event["name"].startswith("smoltrain: ")]
    segments = flatten_ranges(ranges)
    parts = [segment.part for segment in segments if segment.part != HOST_GAPS]  # microseconds between two marks
    one_step = ["records", "data", OTHER_RANKS, "forward", "norms", "forward", "MLP", "forward"]
    for part in one_step:
        assert part in parts
    assert parts.count("data") == parts.count("update") == 3
    assert RECOMPUTED in parts
    last_recomputed = max(index for index, part in enumerate(parts) if part == RECOMPUTED)
    assert parts[last_recomputed + 1 : last_recomputed + 3] == ["backward", "reduction"], "the layer was left"
    assert [segment.began_s for segment in segments[1:]] == [segment.ended_s for segment in segments[:-1]]


def test_who_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world: Any = World()
    assert type(open_watchdog(tmp_path, world, 0.0, frozenset())) is Watchdog, "nobody has asked"
    monkeypatch.setenv(PROFILE_VARIABLE, ProfileRequest(2, 3, "trace").to_text())
    world.is_first = False
    assert type(open_watchdog(tmp_path, world, 0.0, frozenset())) is Watchdog, "rank 0 alone does"
