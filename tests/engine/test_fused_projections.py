"""q, k, v and gate, up as one product each, under the engine: trained as separate ones, and resumed as either."""

from pathlib import Path
from typing import Any

import pytest
import torch

from smoltrain.config.schema import Config
from smoltrain.errors import DONE, UserError
from smoltrain.kernels.joint_linear import find_layers_apart
from smoltrain.model.build import build_model
from smoltrain.model.interface import ComputeOptions
from tests import launches, tiny
from tests.engine.test_once_per_step import settings_of
from tests.engines import loader_of, whole_state
from tests.ranks import world
from tests.sessions import bare_session, train_steps


def trained(settings: Config, fused: bool) -> tuple[list[float], dict[str, Any], int]:
    """(losses, the whole state of the optimizer, matrix products of a micro-batch); runs on every rank."""
    from smoltrain.engine.build_engine import build_engine

    torch.manual_seed(settings.run.seed)
    recompute: Any = settings.engine.gradient_checkpointing
    model = build_model(settings.model, ComputeOptions(recompute, fused_projections=fused))
    wrapped = build_engine(model, settings, world(), precision=settings.engine.precision, accumulation=2)
    loader = loader_of(settings, world().rank, world().size)
    results = train_steps(range(1, 7), bare_session(settings, wrapped, loader))
    assert find_layers_apart(model) is None, "the weights of each update lie where those before it lay"
    losses = [result.metrics["train/loss_nats_per_token"] for result in results]
    state = whole_state(wrapped)
    loader.wait_until_ready(60)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        wrapped.backward(wrapped.forward(loader.fetch_step_rows().micro_batches[0]))
    products = sum(event.name in ("aten::mm", "aten::addmm") for event in seen.events() or ())
    return losses, state, products


def refused(settings: Config) -> str:
    try:
        trained(settings, fused=True)
    except UserError as error:
        return str(error)
    return "no error"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize(("stage", "by", "size"), [
    (1, "step", 1), (2, "step", 1), (2, "micro_batch", 1), (2, "step", 2), (2, "micro_batch", 2),
])  # fmt: skip
def test_it_trains_as_separate_ones(tmp_path: Path, ranks: Any, stage: int, by: str, size: int, kind: str) -> None:
    """State by state. For Muon q, k and v are matrices of their own: of the joint one it would make another update."""
    settings = settings_of(
        tmp_path, f"engine.ds_config=zero{stage}", f"engine.reduce_gradients={by}", "engine.precision=fp32",
        f"optimizer.kind={kind}", "engine.gradient_checkpointing=none",
    )  # fmt: skip
    fused = ranks(size).run(trained, settings, True)
    separate = ranks(size).run(trained, settings, False)
    for (losses, state, products), (expected, wanted, more_products) in zip(fused, separate, strict=True):
        assert losses == pytest.approx(expected, rel=1e-6)
        assert state.keys() == wanted.keys(), "every weight keeps its name"
        for name, parts in state.items():
            for part, want in zip(parts, wanted[name], strict=True):
                torch.testing.assert_close(torch.tensor(part), torch.tensor(want), rtol=1e-4, atol=2e-6, msg=name)
        # 2 blocks: 4 products forward and 8 backward instead of 7 and 14.
        assert more_products - products == 2 * (3 + 6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_it_is_refused_where_weights_do_not_lie_side_by_side(tmp_path: Path, ranks: Any, stage: int) -> None:
    settings = settings_of(tmp_path, f"engine.ds_config=zero{stage}", "engine.precision=fp32")
    [said] = ranks(1).run(refused, settings)
    assert "projections cannot be fused" in said
    assert f"engine.ds_config=zero{stage}" in said


@pytest.mark.slow
def test_a_run_goes_on_with_the_other_value(tmp_path: Path) -> None:
    losses = []
    for name, first, then in (("changed", "true", "false"), ("plain", "false", "false")):
        folder = tmp_path / name
        folder.mkdir()
        for number, words in enumerate((("run.stop_after=main", first), ("run.stop_after=null", then))):
            stop, fused = words
            told = tiny.words(folder, stop, f"engine.fused_projections={fused}", "engine.precision=fp32")
            log = folder / f"log{number}"
            assert launches.run("smoltrain", told, log) == DONE, log.read_text()
            expects_line = fused == "true"
            assert ("q, k, v as one product" in log.read_text()) == expects_line
        losses.append(launches.losses(folder / "runs" / "quickstart"))
    changed, plain = losses
    assert changed.keys() == plain.keys() == set(range(1, 13))
    assert list(changed.values()) == pytest.approx(list(plain.values()), rel=1e-6)
