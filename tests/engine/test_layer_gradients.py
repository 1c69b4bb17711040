"""Gradient norms and histograms per layer, of the whole gradient and not of one rank's part."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from smoltrain.config.schema import Config, TransformersSection
from smoltrain.data.rows.loader import Loader
from smoltrain.data.rows.open_loader import open_loader
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.engine import layer_gradients
from smoltrain.engine.layer_gradients import BINS, LayerGradient, layer_name, summarize_layer_gradients
from smoltrain.model.build import build_model
from tests import tiny
from tests.models import from_config
from tests.ranks import world

ACCUMULATION = 2


@pytest.mark.parametrize(
    ("parameter", "layer"),
    [
        ("model.layers.3.mlp.up_proj.weight", "layers.03"),
        ("model.layers.12.input_layernorm.weight", "layers.12"),
        ("layers.0.self_attn.q_proj.bias", "layers.00"),
        ("model.layers.123.mlp.down_proj.weight", "layers.123"),
        ("model.embed_tokens.weight", "embed_tokens"),
        ("model.norm.weight", "norm"),
        ("lm_head.weight", "lm_head"),
        ("inner.model.layers.3.self_attn.q_proj.weight", "layers.03"),
        ("inner.model.embed_tokens.weight", "embed_tokens"),
        ("inner.lm_head.weight", "lm_head"),
        ("inner.transformer.h.3.attn.c_attn.bias", "layers.03"),
        ("inner.transformer.wte.weight", "wte"),
        ("inner.transformer.ln_f.bias", "ln_f"),
        ("inner.gpt_neox.layers.10.mlp.dense_h_to_4h.weight", "layers.10"),
        ("inner.model.layers.2.mlp.experts.7.up_proj.weight", "layers.02"),
        ("inner.rwkv.blocks.1.attention.key.weight", "layers.01"),
        ("weight", "weight"),
    ],
)
def test_a_parameters_layer(parameter: str, layer: str) -> None:
    assert layer_name(parameter) == layer


def test_every_parameter_of_the_model_belongs_to_a_block_or_to_an_end(tmp_path: Path) -> None:
    net = build_model(tiny.load(tmp_path).model)
    names = {layer_name(name) for name, _ in net.named_parameters()}
    assert names == {"embed_tokens", "layers.00", "layers.01", "norm"}
    theirs = TransformersSection(
        kind="transformers", model_type="gpt2", vocab_size=61, max_position_embeddings=8, config={"n_layer": 2}
    )
    names = {layer_name(name) for name, _ in build_model(theirs, device="meta").named_parameters()}
    assert names == {"wte", "wpe", "layers.00", "layers.01", "ln_f"}


def test_norm_and_histogram_are_those_of_the_layers_whole_gradient() -> None:
    torch.manual_seed(0)
    pairs = [
        ("model.layers.0.a.weight", torch.randn(7, 5)),
        ("model.norm.weight", torch.randn(3)),
        ("model.layers.0.b.bias", 10 * torch.randn(11)),
        ("model.layers.1.a.weight", torch.zeros(4, 4)),
        ("model.layers.2.a.weight", torch.randn(6, 2).bfloat16().float()),
    ]
    layers = summarize_layer_gradients(lambda: iter(pairs))
    assert list(layers) == ["layers.00", "norm", "layers.01", "layers.02"]
    for name, layer in layers.items():
        whole = torch.cat([g.flatten() for parameter, g in pairs if layer_name(parameter) == name])
        assert layer.norm == pytest.approx(float(torch.linalg.vector_norm(whole.double())), rel=1e-12)
        assert len(layer.counts) == BINS
        assert len(layer.edges) == BINS + 1
        assert layer.counts.sum() == whole.numel()
        assert layer.edges[0] <= whole.min() <= whole.max() <= layer.edges[-1]
        inner = int(((whole >= layer.edges[10]) & (whole < layer.edges[20])).sum())
        assert layer.counts[10:20].sum() == inner


class HostReads(TorchDispatchMode):
    """Counts what makes a host wait for its device: a number that becomes Python's, a shape that depends on numbers."""

    NAMES = frozenset(
        {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "_unique2", "unique_dim"}
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        has_mask = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        if name in self.NAMES or has_mask:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def summarize_on_host(pairs: Sequence[tuple[str, torch.Tensor]]) -> dict[str, LayerGradient]:
    """numpy's norm and histogram of each layer, in fp64."""
    entries: dict[str, list[np.ndarray]] = {}
    for name, gradient in pairs:
        entries.setdefault(layer_name(name), []).append(gradient.flatten().double().numpy())
    summaries = {}
    for name, parts in entries.items():
        values = np.concatenate(parts)
        counts, edges = np.histogram(values[np.isfinite(values)], bins=BINS)
        summaries[name] = LayerGradient(float(np.linalg.norm(values)), counts, edges)
    return summaries


SPANS = [[1.0, 1.0000001], [0.0, 1e-44], [3e38, -3e38], [5.0, 5.0], [-0.0], [np.nan, 1.0, np.inf, -2.0], [np.nan]]


def test_numbers_are_numpys_and_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_gradients, "CPU_SLICE", 100)
    torch.manual_seed(0)
    borders = [np.linspace(low, low + 1.0, BINS + 1) for low in (-0.3, -0.1, 0.7, 1 / 3)]
    pairs = [
        *((f"border{i}.weight", torch.from_numpy(border)) for i, border in enumerate(borders)),
        *((f"border{i}.bias", torch.from_numpy(np.nextafter(x[1:-1], -1.0))) for i, x in enumerate(borders)),
        ("layers.0.a.weight", torch.randn(70, 5)),
        ("norm.weight", torch.randint(-64, 64, (999,)) / 64),  # many on the border of two bins
        ("layers.0.b.bias", 1e-3 * torch.randn(11)),
        ("head.weight", torch.randn(333).bfloat16()),
        ("norm.bias", torch.randint(-64, 64, (77,)) / 64),  # a layer that comes back
        *((f"span{i}.weight", torch.tensor(span)) for i, span in enumerate(SPANS)),
    ]
    reads: list[torch.Size] = []
    read = layer_gradients._read
    monkeypatch.setattr(layer_gradients, "_read", lambda numbers: reads.append(numbers.shape) or read(numbers))
    with HostReads() as host_reads:
        ours = summarize_layer_gradients(lambda: iter(pairs))
    assert host_reads.seen == []
    assert len(reads) == 1
    theirs = summarize_on_host(pairs)
    assert list(ours) == list(theirs)
    for name, layer in ours.items():
        assert layer.norm == pytest.approx(theirs[name].norm, rel=1e-12, nan_ok=True)
        assert layer.counts.tolist() == theirs[name].counts.tolist()
        assert layer.edges.tolist() == theirs[name].edges.tolist()


def test_entries_that_are_not_finite_show_in_the_norm_and_not_in_the_histogram() -> None:
    bad = torch.tensor([1.0, float("nan"), float("inf"), -float("inf"), 2.0])
    layer = summarize_layer_gradients(lambda: [("norm.weight", bad)])["norm"]
    assert not math.isfinite(layer.norm)
    assert layer.counts.sum() == 2
    assert np.isfinite(layer.edges).all()
    nothing = summarize_layer_gradients(lambda: [("norm.weight", torch.full((3,), float("nan")))])["norm"]
    assert nothing.counts.sum() == 0
    assert np.isfinite(nothing.edges).all()


@pytest.mark.parametrize("entries", [[1.0, 1.0000001], [0.0, 1e-44], [3e38, -3e38], [5.0, 5.0], [-0.0]])
def test_no_gradient_is_too_flat_too_small_or_too_large_for_a_histogram(entries: list[float]) -> None:
    layer = summarize_layer_gradients(lambda: [("norm.weight", torch.tensor(entries))])["norm"]
    assert layer.counts.sum() == len(entries)
    assert np.isfinite(layer.edges).all()
    assert math.isfinite(layer.norm)


# ---- under ZeRO, on two real ranks


def loader_of(settings: Config, rank: int, size: int) -> Loader:
    rows = settings.batch.micro_batch_rows * ACCUMULATION * size
    return open_loader(settings, rank, size, rows_per_step=rows, accumulation=ACCUMULATION)


def fresh_model(settings: Config) -> Any:
    torch.manual_seed(settings.run.seed)
    return from_config(settings)


def engine_norms(settings: Config) -> tuple[dict[str, float], dict[str, int], float]:
    """(norm per layer, histogram's count per layer, DeepSpeed's own norm) of one step; runs on every rank."""
    from smoltrain.engine.build_engine import build_engine

    here = world()
    wrapped = build_engine(fresh_model(settings), settings, here, precision="fp32", accumulation=ACCUMULATION)
    loader = loader_of(settings, here.rank, here.size)
    rows = loader.fetch_step_rows()
    num_tokens = loader.unpack_totals(here.sum_ints(*rows.counts)).num_targets
    for batch in rows.micro_batches:
        wrapped.backward(wrapped.forward(batch) * (here.size / num_tokens))
    layers = summarize_layer_gradients(wrapped.gradients)
    assert wrapped.update(lr=1e-3, weight_decay=0.0)
    norms = {name: layer.norm for name, layer in layers.items()}
    counts = {name: int(layer.counts.sum()) for name, layer in layers.items()}
    return norms, counts, wrapped.grad_norm_before_clipping


def plain_norms(settings: Config, size: int) -> tuple[dict[str, float], dict[str, int]]:
    """The same by hand: all ranks' rows through one model, the gradient of the mean loss."""
    net = fresh_model(settings)
    loaders = [loader_of(settings, rank, size) for rank in range(size)]
    taken = [loader.fetch_step_rows() for loader in loaders]
    num_tokens = loaders[0].unpack_totals(torch.tensor([rows.counts for rows in taken]).sum(0).tolist()).num_targets
    for rows in taken:
        for batch in rows.micro_batches:
            (net(batch.ids_BT, batch.labels_BT) / num_tokens).backward()
    parts: dict[str, list[torch.Tensor]] = {}
    for name, parameter in net.named_parameters():
        parts.setdefault(layer_name(name), []).append(parameter.grad.flatten().double())
    wholes = {name: torch.cat(tensors) for name, tensors in parts.items()}
    return {name: float(whole.norm()) for name, whole in wholes.items()}, {n: w.numel() for n, w in wholes.items()}


@pytest.mark.parametrize(("stage", "by"), [(2, "step"), (2, "micro_batch"), (3, "auto")])
def test_norms_under_zero_equal_those_of_plain_torch(tmp_path: Path, ranks: Any, stage: int, by: str) -> None:
    words = (f"engine.ds_config=zero{stage}", "engine.precision=fp32", f"engine.reduce_gradients={by}")
    settings = tiny.load(tmp_path, *words)
    prepare_run_data(settings)
    expected, entries = plain_norms(settings, size=2)
    for norms, counts, whole in ranks(2).run(engine_norms, settings):
        assert norms == pytest.approx(expected, rel=1e-5)
        assert counts == entries
        assert math.sqrt(sum(norm**2 for norm in norms.values())) == pytest.approx(whole, rel=1e-5)
    assert len({round(norm, 4) for norm in expected.values()}) > 1, "layers that all agree could be confused"
