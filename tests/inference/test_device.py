"""Where a trained model computes."""

import pytest
import torch

from smoltrain.config.schema import ModelSection
from smoltrain.inference.device import GIB, ROOM_BESIDE, choose_inference_device, move_to_best_device
from smoltrain.model.build import build_model


def test_a_gpu_with_room_is_taken_and_one_without_is_named() -> None:
    assert choose_inference_device(GIB, None) == (torch.device("cpu"), None)
    device, reason = choose_inference_device(GIB, 100 * GIB)
    assert (device, reason) == (torch.device("cuda", 0), "computes on the GPU, which has room for the model")
    device, reason = choose_inference_device(40 * GIB, 24 * GIB)
    assert device == torch.device("cpu")
    assert reason == "computes on the CPU: the GPU has 24.0 GiB free and the model needs about 51.0"
    just_enough = int(GIB * 1.25) + ROOM_BESIDE
    assert choose_inference_device(GIB, just_enough).device.type == "cuda"
    assert choose_inference_device(GIB, just_enough - 1).device.type == "cpu"
    assert choose_inference_device(GIB, just_enough, num_processes=2).device.type == "cpu"


def test_a_model_goes_where_it_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    section = ModelSection(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        intermediate_size=8, max_position_embeddings=8,
    )  # fmt: skip
    model = build_model(section)
    moved: list[torch.device] = []
    monkeypatch.setattr(model, "to", moved.append)
    assert move_to_best_device(model, lambda: None).reason is None
    assert move_to_best_device(model, lambda: 100 * GIB).device.type == "cuda"
    assert moved == [torch.device("cpu"), torch.device("cuda", 0)]
