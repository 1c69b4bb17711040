"""Whole steps on a CUDA device: that the host waits for nothing within one, and trains what one that waits would."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from smoltrain.config.schema import Config
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.kernels.attention import AttentionKernel
from smoltrain.kernels.compile import CompilableFunction
from smoltrain.model.build import build_model
from smoltrain.model.interface import ComputeOptions
from tests import tiny
from tests.engines import fresh_model, loader_of
from tests.ranks import world
from tests.sessions import bare_session, train_steps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; test_step.py counts on a CPU"),
]
WARM_STEPS = 2  # in which code is compiled and memory is found


def losses_of_steps(settings: Config, compiles: bool, late: bool) -> list[float]:
    """Of six steps; late, the host may not wait in any after the first two but where it reads of the last one."""
    from smoltrain.engine.build_engine import build_engine
    from smoltrain.training import step as step_module

    torch.cuda.manual_seed(0)
    precision = settings.engine.precision
    model = fresh_model(settings)
    engine = build_engine(model, settings, world(), precision=precision, accumulation=2, compiles=compiles)
    assert engine.decides_on_device

    def refuse_to_wait(function: Callable[..., Any]) -> Callable[..., Any]:
        def refusing(step: int, *others: Any) -> Any:
            if not late or step <= WARM_STEPS:
                return function(step, *others)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the mode is a prototype
                torch.cuda.set_sync_debug_mode("error")
            try:
                return function(step, *others)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return refusing

    with pytest.MonkeyPatch.context() as patch:
        for name in ("_start_passes", "start_update"):
            patch.setattr(step_module, name, refuse_to_wait(getattr(step_module, name)))
        session = bare_session(settings, engine, loader_of(settings, 0, 1), reads_late=late)
        results = train_steps(range(1, 7), session)
    assert all(result.metrics["speed/step_s"] > 0 for result in results)
    return [result.metrics["train/loss_nats_per_token"] for result in results]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("compiles", [False, True])
def test_a_step_waits_for_nothing(tmp_path: Path, ranks: Any, compiles: bool, kind: str) -> None:
    settings = tiny.load(tmp_path, "track.gradients_every=0", f"optimizer.kind={kind}")
    prepare_run_data(settings)
    [late] = ranks(1).run(losses_of_steps, settings, compiles, True)
    [at_once] = ranks(1).run(losses_of_steps, settings, compiles, False)
    assert late == pytest.approx(at_once, rel=1e-3), "kernels may add up in another order"


def trained_with_graphs(settings: Config, accumulation: int, graphs: bool) -> tuple[list[float], list[float]]:
    """Losses and norms of six steps; the blocks are one compiled region, replayed with `graphs`."""
    from smoltrain.engine.build_engine import build_engine

    torch.manual_seed(0)
    attention = AttentionKernel("math", "the same bits each time")
    computing = ComputeOptions(attention=attention, compiles=True, compile_region="model", cuda_graphs=graphs)
    model = build_model(settings.model, computing, device=world().device)
    precision = settings.engine.precision
    engine = build_engine(model, settings, world(), precision=precision, accumulation=accumulation, compiles=True)
    session = bare_session(settings, engine, loader_of(settings, 0, 1, accumulation))
    metrics = [result.metrics for result in train_steps(range(1, 7), session)]
    losses = [one["train/loss_nats_per_token"] for one in metrics]
    norms = [one["train/grad_norm_before_clipping"] for one in metrics]
    return losses, norms


@pytest.mark.parametrize("accumulation", [1, 4])
def test_replayed_graphs_train_what_launches_do(tmp_path: Path, ranks: Any, accumulation: int) -> None:
    """Six steps, so that each graph is recorded and replayed; a gradient that was overwritten would be in the norm."""
    settings = tiny.load(tmp_path, "track.gradients_every=2", f"batch.accumulation={accumulation}")
    prepare_run_data(settings)
    [(losses, norms)] = ranks(1).run(trained_with_graphs, settings, accumulation, True)
    [(expected, wanted)] = ranks(1).run(trained_with_graphs, settings, accumulation, False)
    assert losses == pytest.approx(expected, rel=1e-3), "kernels may add up in another order"
    assert norms == pytest.approx(wanted, rel=1e-2)


def test_code_that_cannot_be_recorded_is_an_error() -> None:
    """Left to itself torch would launch each kernel as ever, and log a line."""
    halves = CompilableFunction(lambda x: 2 * x.cpu(), cuda_graphs=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own, about TF32 and torch.jit
        with pytest.raises(RuntimeError, match="skipping cudagraphs"):
            halves.compiled(torch.ones(8, device="cuda"))
