"""CUDA graphs: what a replay would overwrite is gone by then, and who holds on to it is refused.

A replay itself needs a GPU (tests/gpu/test_steps.py).
"""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from smoltrain.config.schema import Config
from smoltrain.errors import UserError
from smoltrain.model import decoder
from smoltrain.model.build import build_model
from smoltrain.model.interface import ComputeOptions
from tests.engine.test_once_per_step import settings_of
from tests.engines import loader_of
from tests.ranks import world
from tests.sessions import bare_session, train_steps

GRAPHS = ComputeOptions(compiles=True, compile_region="model", cuda_graphs=True)


def count_what_outlives(settings: Config, accumulation: int) -> tuple[int, int]:
    """(what the region made, how much of it lived when the region ran next), over three steps: outputs and gradients.

    The region is not compiled; the step begins as on a GPU. Gradients of a tied table come from outside of the region.
    """
    from smoltrain.engine.build_engine import build_engine

    made: list[StorageWeakRef] = []
    outlived: list[StorageWeakRef] = []
    region = decoder._run_blocks_and_norm.function
    seen = 0

    def watched(*inputs: Any) -> torch.Tensor:
        nonlocal seen
        gc.collect()
        outlived.extend(one for one in made[seen:] if not one.expired())
        seen = len(made)
        output = region(*inputs)
        made.append(StorageWeakRef(output.untyped_storage()))
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(decoder._replay_blocks_and_norm.__dict__, "compiled", watched)
        torch.manual_seed(settings.run.seed)
        model = build_model(settings.model, GRAPHS)
        for name, weight in model.named_parameters():
            if name.startswith(("layers.", "norm.")):
                weight.register_hook(lambda gradient: made.append(StorageWeakRef(gradient.untyped_storage())))
        precision = settings.engine.precision
        engine = build_engine(model, settings, world(), precision=precision, accumulation=accumulation)
        train_steps(range(1, 4), bare_session(settings, engine, loader_of(settings, 0, 1, accumulation)))
    return len(made), len(outlived)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_nothing_that_a_replay_overwrites_is_held_on_to(tmp_path: Path, ranks: Any, accumulation: int, precision: str):
    settings = settings_of(
        tmp_path, f"batch.accumulation={accumulation}", "engine.reduce_gradients=step", f"engine.precision={precision}"
    )
    [(made, outlived)] = ranks(1).run(count_what_outlives, settings, accumulation)
    assert made > 3 * accumulation * 10
    assert outlived == 0


@pytest.mark.slow
def test_zero_0_holds_on_to_gradients(tmp_path: Path, ranks: Any):
    """So it is refused; and the count above can fail."""
    settings = settings_of(tmp_path, "engine.ds_config=zero0", "batch.accumulation=3", "engine.precision=fp32")
    [(_, outlived)] = ranks(1).run(count_what_outlives, settings, 3)
    assert outlived > 0


def refusal_of(settings: Config) -> str:
    from smoltrain.engine.build_engine import build_engine

    model = build_model(settings.model, GRAPHS)
    with pytest.raises(UserError) as refused:
        build_engine(model, settings, world(), precision=settings.engine.precision, accumulation=2)
    return str(refused.value)


@pytest.mark.parametrize("words", [("engine.ds_config=zero3",), ("engine.precision=fp16",)], ids=["zero3", "fp16"])
def test_deepspeeds_reduction_is_refused(tmp_path: Path, ranks: Any, words: tuple[str, ...]):
    graphs = ("engine.cuda_graphs=true", "engine.compile=on", "engine.compile_region=model")
    [said] = ranks(1).run(refusal_of, settings_of(tmp_path, *words, *graphs))
    assert "CUDA graphs cannot be replayed" in said
    assert "engine.cuda_graphs or engine.reduce_gradients" in said


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_weights_are_read_where_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """torch copies an input of a graph to where it was recorded, but for those marked as static: all weights are."""
    marks: dict[str, Any] = {}

    def look(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
        for name, given in zip(names, inputs, strict=True):
            marks[name] = getattr(given, "_dynamo_static_input_type", None)
        return graph.forward

    compiled = torch.compile(decoder._run_blocks_and_norm.function, dynamic=False, backend=look)
    monkeypatch.setitem(decoder._replay_blocks_and_norm.__dict__, "compiled", compiled)
    settings = settings_of(tmp_path)
    model = build_model(settings.model, GRAPHS)
    model.train()
    ids = torch.zeros(2, 8, dtype=torch.int64)
    model(ids, ids).backward()
    weights = {name: mark for name, mark in marks.items() if "_parameters_" in name}
    assert len(weights) == sum(name.startswith(("layers.", "norm.")) for name, _ in model.named_parameters())
    assert all(weights.values())
    assert len(marks) - len(weights) == 3  # the residual stream and the rotary angles, which are copied
