"""Norms and updates of each layer's master weights, under every ZeRO stage, against one plain process."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from smoltrain.config.schema import Config
from smoltrain.engine.layer_gradients import layer_name
from smoltrain.engine.layer_weights import LayerWeight
from smoltrain.engine.optimizer import OPTIMIZERS
from tests import engines
from tests.engines import ROWS, T, V
from tests.ranks import world

LR, DECAY, STEPS = 1e-2, 0.1, 3


def rows_of(step: int) -> torch.Tensor:
    return torch.randint(V, (ROWS, T + 1), generator=torch.Generator().manual_seed(step))


def watched(settings: Config) -> list[dict[str, LayerWeight]]:
    """What is measured at each step; on every rank."""
    from smoltrain.data.rows.batch import Batch

    engine = engines.engine_of(settings, seed=3)
    here = world()
    measured: list[dict[str, LayerWeight]] = []
    for step in range(STEPS):
        for row in rows_of(step)[here.rank :: here.size]:
            engine.backward(engine.forward(Batch(row[None].int())) * (here.size / (ROWS * T)))
        meter = engine.watch_update()
        assert engine.update(lr=LR, weight_decay=DECAY)
        measured.append(meter.measure())
    return measured


def plain(settings: Config) -> list[dict[str, LayerWeight]]:
    """The same by hand: all rows through one model, torch's own clipping and optimizer."""
    torch.manual_seed(3)
    net = engines.Odd()
    kind = OPTIMIZERS[settings.optimizer.kind]
    section = settings.optimizer
    groups = kind.parameter_groups(net, section)
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(section.beta1, section.beta2), eps=section.eps)
    for group in optimizer.param_groups:
        group["weight_decay"] = DECAY if group["decays"] else 0.0
    measured: list[dict[str, LayerWeight]] = []
    for step in range(STEPS):
        ids = rows_of(step)
        (net(ids[:, :-1], ids[:, 1:]) / (ROWS * T)).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), section.gradient_clipping)
        trained = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
        before = {name: parameter.detach().clone() for name, parameter in trained.items()}
        optimizer.step()
        optimizer.zero_grad()
        layers: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for name, parameter in trained.items():
            pair = (before[name], parameter.detach() - before[name])
            layers.setdefault(layer_name(name), []).append(pair)
        found = {}
        for layer, pairs in layers.items():
            norm = math.sqrt(sum(float(old.double().square().sum()) for old, _ in pairs))
            change = math.sqrt(sum(float(moved.double().square().sum()) for _, moved in pairs))
            found[layer] = LayerWeight(norm, change / norm)
        measured.append(found)
    return measured


@pytest.mark.parametrize(
    ("stage", "by"), [(0, "auto"), (1, "micro_batch"), (1, "step"), (2, "micro_batch"), (2, "step"), (3, "auto")]
)
def test_they_are_those_of_one_plain_process(tmp_path: Path, ranks: Any, stage: int, by: str) -> None:
    settings = engines.settings_of(tmp_path, stage, "fp32", by).model_copy()
    track = settings.track.model_copy(update={"gradients_every": 1})
    settings = settings.model_copy(update={"track": track})
    expected = plain(settings)
    for measured in ranks(2).run(watched, settings):
        for ours, theirs in zip(measured, expected, strict=True):
            assert list(ours) == list(theirs)
            for layer, weight in theirs.items():
                assert ours[layer].norm == pytest.approx(weight.norm, rel=1e-6), layer
                assert ours[layer].update_ratio == pytest.approx(weight.update_ratio, rel=2e-3), layer
    ratios = [weight.update_ratio for weight in expected[-1].values()]
    assert len({round(ratio, 4) for ratio in ratios}) > 3, "layers that all agree could be confused"
