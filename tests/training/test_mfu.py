"""MFU by hand, by the estimate's rule, over the peak of all ranks."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from smoltrain.config.load import load_config
from smoltrain.estimate.devices import GpuPeak
from smoltrain.estimate.speed import model_flops_utilization
from smoltrain.estimate.training_setup import build_training_setup
from smoltrain.model.own_model import use_own_model
from smoltrain.training import mfu
from smoltrain.training.mfu import cores_over_first, open_mfu_meter


def world_of(kind: str, size: int, answers: list[Any] | None = None) -> Any:
    """Ranks of which every one says the same, or each what `answers` has."""
    return SimpleNamespace(
        device=torch.device(kind), size=size, machines=(0,) * size, gather=lambda value: answers or [value] * size
    )  # fmt: skip


def test_mfu_is_what_a_hand_calculates() -> None:
    config = load_config("quickstart", ["batch.sequence_length=128", "model.tie_word_embeddings=true"])
    meter = open_mfu_meter(config, 2e12, "bf16", world_of("cpu", 2))
    parameters, layers, width = 2_000_128, config.model.num_hidden_layers, config.model.hidden_size  # type: ignore[union-attr]
    by_hand = 6 * parameters + 12 * layers * width * 128
    assert meter.flops_per_token == by_hand
    assert meter.measure(1e4) == {"speed/mfu": pytest.approx(1e4 * by_hand / 2e12)}
    assert meter.description == ("2.00 TFLOP/s bf16 over 2 ranks, measured on this machine: speed/mfu is a share of it")


def test_mfu_is_that_of_the_estimate() -> None:
    config = load_config("quickstart", ["batch.micro_batch=8"])
    setup = build_training_setup(config, world=2, device="cpu")
    meter = open_mfu_meter(config, 1e12, "bf16", world_of("cpu", 2))
    assert meter.measure(5e3)["speed/mfu"] == pytest.approx(model_flops_utilization(setup, 5e3, 1e12 / 2))


def test_gpus_of_all_ranks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("quickstart")
    peaks = [GpuPeak(989e12, "the data sheet of A"), GpuPeak(312e12, "the data sheet of B")]
    monkeypatch.setattr(mfu, "find_gpu_peak", lambda device, precision: peaks[0])
    meter = open_mfu_meter(config, None, "bf16", world_of("cuda", 2, peaks))
    assert meter.peak_flops == 1301e12
    assert meter.description == ("1,301.00 TFLOP/s bf16 over 2 ranks, the data sheet of A: speed/mfu is a share of it")


def test_one_unknown_gpu_leaves_no_mfu_and_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = [GpuPeak(989e12, "the data sheet of A"), GpuPeak(None, "no data sheet of B is known here")]
    monkeypatch.setattr(mfu, "find_gpu_peak", lambda device, precision: peaks[0])
    meter = open_mfu_meter(load_config("quickstart"), None, "bf16", world_of("cuda", 2, peaks))
    assert meter.measure(1e4) == {}
    assert meter.description == "unknown (no data sheet of B is known here), so that no speed/mfu is logged"


def test_a_programs_own_model_has_no_mfu_and_trains() -> None:
    config = use_own_model(load_config("quickstart"), torch.nn.Identity())
    meter = open_mfu_meter(config, 1e12, "bf16", world_of("cpu", 1))
    assert meter.measure(1e4) == {}
    assert meter.description.startswith("unknown (nobody here knows how much a program's own model computes), ")


@pytest.mark.parametrize(
    ("cores", "times"),
    [
        ([(0, [(0,), (1,)]), (0, [(0,), (1,)])], 1),  # they share a machine
        ([(0, [(0,)]), (0, [(1,)])], 2),  # a launcher has bound them
        ([(0, [(0,), (1,)]), (1, [(0,), (1,)])], 2),  # two machines
        ([(0, [(0,), (1,)]), (1, [(0,), (1,), (2,), (3,)])], 3),
    ],
)
def test_cores_count_once_however_many_ranks_may_use_them(cores: list[Any], times: float) -> None:
    assert cores_over_first(cores) == times
