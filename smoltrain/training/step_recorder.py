"""A few steps under torch's profiler, where `smoltrain profile` asks for them: every sign of life begins a range.

The places that the loop marks for the watchdog (watchdog.py) follow each other without a gap. As ranges of the profiler
they cut the time of a step into parts that add up to it; the layers of the model are ranges inside. Nothing of this is
there in a run that is not profiled.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from smoltrain.distributed.world import World
from smoltrain.kernels.loss import LOSS_RANGE, RANGE_PREFIX
from smoltrain.training.watchdog import Watchdog

PROFILE_VARIABLE = "SMOLTRAIN_PROFILE"  # a ProfileRequest, for the ranks of `smoltrain profile`
OTHER_RANKS = "other ranks"  # waited for before the forward pass: until everybody has rows
LAYER_KINDS = (("attn", "attention"), ("attention", "attention"), ("mlp", "MLP"), ("norm", "norms"), ("ln_", "norms"))


@dataclass(frozen=True)
class ProfileRequest:
    """Which steps rank 0 is to record, and where the trace goes."""

    first: int
    last: int
    trace: str

    def to_text(self) -> str:
        """For PROFILE_VARIABLE."""
        return json.dumps(asdict(self))


def read_profile_request(world: World) -> ProfileRequest | None:
    """What this rank is to record: nothing, but on rank 0 of a run that is profiled."""
    text = os.environ.get(PROFILE_VARIABLE)
    return ProfileRequest(**json.loads(text)) if text and world.is_first else None


class RecordingWatchdog(Watchdog):
    """A watchdog whose signs of life are ranges of a trace, from the first of the requested steps to the last."""

    def __init__(self, *arguments: Any, request: ProfileRequest) -> None:
        super().__init__(*arguments)
        self._request = request
        self._range: record_function | None = None  # the one that is open
        self._has_begun = False
        self._last_place = ""
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities, acc_events=True)  # without it torch 2.11 warns at every start

    def begin_step(self, step: int) -> None:
        """As any watchdog; the profiler starts and stops here."""
        super().begin_step(step)
        if step == self._request.first and not self._has_begun:  # a step that is skipped begins once more
            self._has_begun = True
            _wait_for_device()
            self._profile.start()
            self._begin_range("begin")
        elif step == self._request.last + 1 and self._range is not None:
            _wait_for_device()  # what the host has given the device belongs to these steps
            self._end_range()
            self._profile.stop()
            self._profile.export_chrome_trace(self._request.trace)

    def mark(self, place: str) -> None:
        """As any watchdog."""
        super().mark(place)
        if self._range is not None:
            self._begin_range(OTHER_RANKS if place == "reduction" and self._last_place == "data" else place)
        self._last_place = place

    def _begin_range(self, place: str) -> None:
        self._end_range()
        self._range = record_function(RANGE_PREFIX + place)
        self._range.__enter__()

    def _end_range(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None


def open_watchdog(logs: Path, world: World, limit_s: float, unseen: frozenset[int]) -> Watchdog:
    """The watchdog of this rank; a recording one where its steps are to be profiled."""
    request = read_profile_request(world)
    if request is None:
        return Watchdog(logs, world.rank, world.size, limit_s, unseen)
    return RecordingWatchdog(logs, world.rank, world.size, limit_s, unseen, request=request)


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def name_layers(model: torch.nn.Module) -> None:
    """Let each layer that is not compiled be a range, of its kind; the innermost one counts where they nest."""
    for name, module in model.named_modules():
        kind = find_layer_kind(name, module)
        if kind is None:
            continue
        ranges: list[record_function] = []

        def enter_layer(*_: Any, kind: str = kind, ranges: list[record_function] = ranges) -> None:
            ranges.append(record_function(RANGE_PREFIX + kind))
            ranges[-1].__enter__()

        def leave_layer(*_: Any, ranges: list[record_function] = ranges) -> None:
            if ranges:
                ranges.pop().__exit__(None, None, None)

        module.register_forward_pre_hook(enter_layer)
        module.register_forward_hook(leave_layer, always_call=True)  # recomputation leaves the last one by an exception


def find_layer_kind(name: str, module: torch.nn.Module) -> str | None:
    """By the last word of its name: attention, MLP, norms, embedding or the head; None for what lies around these."""
    if isinstance(module, torch.nn.Embedding):
        return "embedding"
    word = name.rpartition(".")[2].lower()
    if word == "lm_head":
        return LOSS_RANGE
    return next((kind for part, kind in LAYER_KINDS if part in word), None)
