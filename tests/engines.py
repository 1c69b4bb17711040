"""Engines for tests: of the tiny run's model and its rows, and of an odd little model whose rows are made here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from smoltrain.checkpoint.manifest import WEIGHTS_FILE
from smoltrain.config.schema import Config
from smoltrain.data.rows.batch import Batch
from smoltrain.data.rows.loader import Loader
from smoltrain.data.rows.open_loader import open_loader
from tests import tiny
from tests.models import from_config
from tests.ranks import world

ROWS, T, V = 12, 6, 13  # of the odd model: rows per step, tokens per row, vocabulary


# ---- the tiny run's


def loader_of(settings: Config, rank: int, size: int, accumulation: int = 2) -> Loader:
    rows = settings.batch.micro_batch_rows * accumulation * size
    return open_loader(settings, rank, size, rows_per_step=rows, accumulation=accumulation)


def fresh_model(settings: Config) -> Any:
    torch.manual_seed(settings.run.seed)
    return from_config(settings)


def masked_engine(settings: Config, masked_by: str, patch: pytest.MonkeyPatch, accumulation: int = 2) -> Any:
    """An engine whose update is masked by compiled loops (one pass), or by the step that runs on a GPU (own step)."""
    from smoltrain.engine.build_engine import build_engine
    from smoltrain.engine.optimizer import OPTIMIZERS

    if masked_by == "own step":  # whose AdamW is torch's fused one, which a CPU has too
        kind = type(OPTIMIZERS[settings.optimizer.kind])
        build = kind.build
        gpu = torch.device("cuda")
        patch.setattr(kind, "build", lambda self, groups, section, _: build(self, groups, section, gpu))
    precision = settings.engine.precision
    compiles = masked_by == "one pass"
    model = fresh_model(settings)
    engine = build_engine(model, settings, world(), precision=precision, accumulation=accumulation, compiles=compiles)
    assert engine.decides_on_device
    return engine


# ---- the odd one


class Odd(torch.nn.Module):
    """Tied weights, two parameter groups, sizes that no number of ranks divides: 135 elements decay, 12 do not.

    And 30 are never trained.

    Without biases: the F.linear that DeepSpeed puts in torch's place under ZeRO-3 rounds them otherwise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(V, 5)
        self.norm = torch.nn.LayerNorm(5, bias=False)
        self.up = torch.nn.Linear(5, 7, bias=False)
        self.norm_up = torch.nn.LayerNorm(7, bias=False)
        self.down = torch.nn.Linear(7, 5, bias=False)
        self.head = torch.nn.Linear(5, V, bias=False)
        self.head.weight = self.embed.weight
        self.places = torch.nn.Parameter(torch.randn(T, 5), requires_grad=False)

    def forward(self, ids_BT: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids_BT) + self.places
        x = x + self.down(torch.tanh(self.norm_up(self.up(self.norm(x)))))
        logits = self.head(x).float().flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels_BT.flatten(), reduction="sum")


def settings_of(folder: Path, stage: int | str, precision: str, by: str = "auto", kind: str = "adamw") -> Config:
    """`by`: who reduces, engine.reduce_gradients; auto is `step` wherever that can be. `kind`: the optimizer."""
    name = f"zero{stage}" if isinstance(stage, int) else stage
    words = (f"engine.ds_config={name}", f"engine.precision={precision}", f"engine.reduce_gradients={by}")
    return tiny.load(folder, *words, f"optimizer.kind={kind}", "batch.micro_batch=1", "track.gradients_every=0")


def refuse(engine: Any) -> float:
    """Have the engine discard the gradients of a step that is not allowed, as of a spike; their norm."""
    squared_norm = world().gather_numbers(engine.reduce().view(1)).sum()
    refused = torch.tensor(False)
    outcome = engine.start_update(lr=1e-2, weight_decay=0.1, squared_norm=squared_norm, is_allowed=refused)
    assert not outcome.applied
    engine.finish_update(False, float(outcome.gradient_norm))
    return float(outcome.gradient_norm)


def engine_of(settings: Config, seed: int) -> Any:
    from smoltrain.engine.build_engine import build_engine

    torch.manual_seed(seed)
    accumulation = ROWS // world().size
    return build_engine(Odd(), settings, world(), precision=settings.engine.precision, accumulation=accumulation)


def train(wrapped: Any, first: int, last: int) -> list[float]:
    """The mean losses of steps first..last, each of the same rows on any number of ranks."""
    here, losses = world(), []
    for step in range(first, last + 1):
        ids = torch.randint(V, (ROWS, T + 1), generator=torch.Generator().manual_seed(step))
        total = 0.0
        for row in ids[here.rank :: here.size]:
            loss = wrapped.forward(Batch(row[None].int()))
            total += float(loss.detach())
            wrapped.backward(loss * (here.size / (ROWS * T)))
        assert wrapped.update(lr=1e-2, weight_decay=0.1)
        losses.append(here.sum_floats(total)[0] / (ROWS * T))
    return losses


def whole_state(wrapped: Any, keys: tuple[str, ...] = ("exp_avg", "exp_avg_sq")) -> dict[str, list[Any]]:
    """Master weight, optimizer state, compute weight of every parameter, gathered; and the step counts.

    `keys`: the names of the state, but for muon's of the hidden matrices, in the odd model and in the tiny run's.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    optimizer = wrapped._deepspeed.optimizer
    if wrapped.stage in (1, 2):
        optimizer._hp_optimizer_states_linked = False  # DeepSpeed finds the moments by name after a step only
        optimizer._lazy_init_hp_params_optimizer_state()
    found: dict[str, list[Any]] = {}
    inner = getattr(optimizer, "optimizer", optimizer)
    has_muon = any(group.get("hidden") for group in inner.param_groups)
    for name, p in wrapped.module.named_parameters():
        whole: list[Any]
        is_hidden = name.endswith("_proj.weight") or name in ("up.weight", "down.weight")
        names = ("momentum_buffer",) if has_muon and is_hidden else keys
        if not p.requires_grad:
            continue  # losses tell of it
        if wrapped.stage == 0:
            whole = [p, *(optimizer.state[p][key] for key in names)]
        else:
            whole = [safe_get_full_fp32_param(p), *(safe_get_full_optimizer_state(p, key) for key in names)]
        found[name] = [x.detach().tolist() for x in whole]
    for name, weights in wrapped.weights(keep=True).items():
        if name in found:
            found[name].append(weights.tolist())
    return found | {"step": sorted({float(state["step"]) for state in inner.state.values() if "step" in state})}


def write_files(wrapped: Any, folder: Path) -> None:
    """What a checkpoint would hold of the engine, without the rest of it."""
    for name, state in wrapped.training_state(folder).items():
        torch.save(state, folder / name)
    if weights := wrapped.weights(keep=world().is_first):
        save_file(weights, folder / WEIGHTS_FILE)
    world().barrier()


def read_files(wrapped: Any, folder: Path, stage: int) -> None:
    """Restore what `write_files` wrote under a ZeRO stage."""
    wrapped.load_shards(folder, stage, load_file(folder / WEIGHTS_FILE))
