"""One short training run in a plain loop, whose settings are tried one at a time: what benchmarks/ideas.py compares.

The model is the product's, the rows are those that quickstart would be dealt, the masters and all arithmetic are fp32.
Of the engine it has Muon alone (no ranks, no DeepSpeed), so that an idea can be tried before there is a key for it.

Legend: B rows, T tokens of a row, D width, E width of a head.
"""

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from smoltrain.config.load import load_config
from smoltrain.config.schema import Config, OptimizerSection
from smoltrain.data.rows.batch import Batch
from smoltrain.data.rows.loader import Loader
from smoltrain.data.rows.open_loader import open_loader
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.engine.hidden_matrices import split_parameters
from smoltrain.engine.muon import MuonOptimizer
from smoltrain.kernels.loss import IGNORE_INDEX, LossKernel
from smoltrain.model.build import build_model
from smoltrain.model.decoder import Decoder
from smoltrain.model.interface import ComputeOptions

FUSED = LossKernel("fused", "as quickstart's on a CPU")
NUM_VALIDATION_ROWS = 192


@dataclasses.dataclass(frozen=True)
class Trial:
    """The settings of a run; the defaults are the base to which each idea is added alone."""

    optimizer: str = "muon"  # or adamw, for all parameters
    lr: float = 8e-3
    warmup_steps: int = 16
    schedule: str = "cosine"  # or linear, or wsd
    final_share: float = 0.1  # of lr, at the end
    decay_share: float = 0.2  # of the run, in which wsd falls
    embedding_lr_factor: float = 1.0
    beta2: float = 0.95
    momentum: float = 0.95
    momentum_warmup_steps: int = 0  # in which the momentum rises from 0.85
    newton_schulz_steps: int = 5
    weight_decay: float = 0.1
    decay_falls_with_lr: bool = False
    gradient_clipping: float = 1.0
    z_loss: float = 0.0
    ramp_share: float = 0.0  # of the tokens, which come in steps of half the rows
    embedding_std: float = 0.02
    residual_scale: float = 1.0  # of the initial projections that write to the residual stream
    qk_norm: bool = False
    tied: bool = True
    hidden_size: int = 128  # half of quickstart's, and so is the width inside of its MLP: a run is four times cheaper
    intermediate_size: int = 352
    rows: int = 8
    steps: int = 160


class HeadNorm(nn.Module):
    """RMSNorm over each head's E (Henry et al. 2020; Qwen3): [B, T, heads * E] -> the same."""

    def __init__(self, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        self.norm = nn.RMSNorm(head_width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """The normalised queries or keys."""
        return self.norm(x.unflatten(-1, (-1, self.head_width))).flatten(-2)


def make_muon(matrices: list[nn.Parameter], *, momentum: float, newton_schulz_steps: int) -> MuonOptimizer:
    """The engine's, on whole matrices."""
    settings = {"momentum": momentum, "newton_schulz_steps": newton_schulz_steps}
    return MuonOptimizer([{"params": matrices, "hidden": True, **settings}], OptimizerSection(), fused=False)


def train_trial(trial: Trial, seed: int, words: list[str]) -> dict[str, Any]:
    """Train and validate; `words` are overrides of quickstart. The seed is of weights and of the order of the rows."""
    torch.set_num_threads(1)
    config = load_trial_config(seed, words)
    prepare_run_data(config)
    loader = open_loader(config, 0, 1, rows_per_step=1, accumulation=1)
    torch.manual_seed(seed)
    model = make_model(trial, config)
    optimizers = make_optimizers(trial, model)
    began_s = time.process_time()
    num_rows = trial.rows * trial.steps
    done = 0
    step = 0
    while done < num_rows:
        rows = rows_of_step(trial, done / num_rows)
        batch = fetch_rows(loader, min(rows, num_rows - done))
        loss = model(batch.ids_BT, batch.labels_BT) / batch.labels_BT.numel()
        loss.backward()
        if trial.gradient_clipping:
            nn.utils.clip_grad_norm_(model.parameters(), trial.gradient_clipping)
        set_rates(trial, optimizers, step, done / num_rows)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        done += rows
        step += 1
    took_s = time.process_time() - began_s
    validation = validate(model, loader)
    loader.close()
    return {"validation": validation, "core_seconds": took_s, "updates": step}


def load_trial_config(seed: int, words: list[str]) -> Config:
    """quickstart's config, whose rows are dealt one by one."""
    return load_config("quickstart", [*words, f"run.seed={seed}", "batch.micro_batch=1", "batch.accumulation=1"])


def make_model(trial: Trial, config: Config) -> Decoder:
    """The product's decoder with the trial's shape and first weights."""
    shape = {"hidden_size": trial.hidden_size, "intermediate_size": trial.intermediate_size}
    section = config.model.model_copy(update={**shape, "tie_word_embeddings": trial.tied})
    model = build_model(section, ComputeOptions(loss=FUSED, z_loss=trial.z_loss))
    assert isinstance(model, Decoder)
    with torch.no_grad():
        model.embed_tokens.weight.mul_(trial.embedding_std / model.section.initializer_range)
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(trial.residual_scale)
    if trial.qk_norm:
        for module in list(model.modules()):
            if hasattr(module, "q_proj"):
                attention: Any = module
                attention.q_proj = nn.Sequential(attention.q_proj, HeadNorm(attention.head_width))
                attention.k_proj = nn.Sequential(attention.k_proj, HeadNorm(attention.head_width))
    return model.train()


def make_optimizers(trial: Trial, model: nn.Module) -> list[torch.optim.Optimizer]:
    """AdamW for embeddings, head and vectors, and under muon Muon for the hidden matrices, else AdamW too."""
    split = split_parameters(model)
    hidden = list(split.hidden.values())
    groups: list[dict[str, Any]] = [
        {"params": list(split.tables.values()), "lr_factor": trial.embedding_lr_factor, "decays": True},
        {"params": list(split.vectors.values()), "lr_factor": 1.0, "decays": False},
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if trial.optimizer == "muon":
        steps = trial.newton_schulz_steps
        optimizers.append(make_muon(hidden, momentum=trial.momentum, newton_schulz_steps=steps))
        optimizers[0].param_groups[0].update(lr_factor=1.0, decays=True)
    else:
        groups.append({"params": hidden, "lr_factor": 1.0, "decays": True})
    optimizers.append(torch.optim.AdamW(groups, betas=(0.9, trial.beta2)))
    return optimizers


def set_rates(trial: Trial, optimizers: list[torch.optim.Optimizer], step: int, share_done: float) -> None:
    """Give all parameter groups the values of the coming update; `step` counts from 0."""
    factor = lr_share(trial, step, share_done)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = trial.lr * factor * group["lr_factor"]
        decay = trial.weight_decay if group["decays"] else 0.0
        group["weight_decay"] = decay * factor if trial.decay_falls_with_lr else decay
        if "momentum" in group and trial.momentum_warmup_steps:
            share = min(1.0, step / trial.momentum_warmup_steps)
            group["momentum"] = 0.85 + (trial.momentum - 0.85) * share


def lr_share(trial: Trial, step: int, share_done: float) -> float:
    """The learning rate after `step` updates and this share of the tokens, as a share of trial.lr."""
    if step < trial.warmup_steps:
        return (step + 1) / trial.warmup_steps
    warmup_share = trial.warmup_steps / trial.steps
    done = (share_done - warmup_share) / (1 - warmup_share)
    if trial.schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * done))
    elif trial.schedule == "linear":
        left = 1 - done
    else:
        left = min(1.0, (1 - share_done) / trial.decay_share)
    return trial.final_share + (1 - trial.final_share) * left


def rows_of_step(trial: Trial, share_done: float) -> int:
    """Rows of the coming step."""
    return trial.rows // 2 if share_done < trial.ramp_share else trial.rows


def fetch_rows(loader: Loader, num_rows: int) -> Batch:
    """The next rows, as one batch."""
    batches: list[Batch] = []
    for _ in range(num_rows):
        rows = loader.fetch_step_rows()
        batches += rows.micro_batches
        loader.mark_consumed(loader.unpack_totals(rows.counts))
    return Batch(torch.cat([batch.ids_BS for batch in batches]))


@torch.no_grad()
def validate(model: nn.Module, loader: Loader) -> float:
    """Nats per token over NUM_VALIDATION_ROWS held-out rows."""
    model.eval()
    losses = list(_row_losses(model, loader))
    return sum(losses) / len(losses)


def _row_losses(model: nn.Module, loader: Loader) -> Iterator[float]:
    for batch in loader.validation_batches(NUM_VALIDATION_ROWS):
        yield float(model(batch.ids_BT, batch.labels_BT)) / int((batch.labels_BT != IGNORE_INDEX).sum())
