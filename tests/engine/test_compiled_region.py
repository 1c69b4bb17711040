"""All blocks as one compiled region, under the engine: the losses and weights of blocks that are not compiled."""

from pathlib import Path
from typing import Any

import pytest
import torch

from smoltrain.config.schema import Config
from smoltrain.model.build import build_model
from smoltrain.model.interface import ComputeOptions
from tests.engine.test_once_per_step import settings_of
from tests.engines import loader_of
from tests.ranks import world
from tests.sessions import bare_session, train_steps


def trained(settings: Config, compiles: bool) -> tuple[list[float], dict[str, torch.Tensor], int]:
    """(losses, weights, graphs) of four steps; runs on every rank. Traced as ever, run by torch's own kernels."""
    from torch._dynamo.testing import CompileCounterWithBackend

    from smoltrain.engine.build_engine import build_engine
    from smoltrain.model.decoder import _run_blocks_and_norm

    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(_run_blocks_and_norm.function, dynamic=False, backend=counter)
    _run_blocks_and_norm.__dict__["compiled"] = compiled
    try:
        torch.manual_seed(settings.run.seed)
        recompute: Any = settings.engine.gradient_checkpointing
        computing = ComputeOptions(recompute, compiles=compiles, compile_region="model")
        model = build_model(settings.model, computing)
        precision = settings.engine.precision
        wrapped = build_engine(model, settings, world(), precision=precision, accumulation=2)
        session = bare_session(settings, wrapped, loader_of(settings, world().rank, world().size))
        results = train_steps(range(1, 5), session)
        losses = [result.metrics["train/loss_nats_per_token"] for result in results]
        return losses, wrapped.weights(keep=True), counter.frame_count
    finally:
        del _run_blocks_and_norm.__dict__["compiled"]


@pytest.mark.slow
@pytest.mark.parametrize("document_mask", ["false", "true"])
@pytest.mark.parametrize(
    ("stage", "by"), [(0, "micro_batch"), (1, "step"), (2, "step"), (2, "micro_batch"), (3, "micro_batch")]
)
def test_it_trains_as_blocks_do(tmp_path: Path, ranks: Any, stage: int, by: str, document_mask: str) -> None:
    settings = settings_of(
        tmp_path, f"engine.ds_config=zero{stage}", f"engine.reduce_gradients={by}", "engine.precision=fp32",
        f"packing.document_mask={document_mask}",
    )  # fmt: skip
    [(losses, weights, num_graphs)] = ranks(1).run(trained, settings, True)
    [(expected, wanted, no_graphs)] = ranks(1).run(trained, settings, False)
    assert losses == expected
    assert all(torch.equal(weight, wanted[name]) for name, weight in weights.items())
    assert no_graphs == 0
    assert num_graphs == 1 or (stage == 3 and num_graphs > 1), "ZeRO-3's hooks, which fetch weights, cut the region"
