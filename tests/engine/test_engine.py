"""The engine against a loop written in nothing but torch: same rows, same losses, same weights. And a run that goes on
from what another number of ranks wrote under another ZeRO stage.
"""

import functools
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from smoltrain.config.schema import Config
from smoltrain.data.rows.loader import Loader, merge_loader_states
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.errors import UserError
from smoltrain.schedule import Plan
from tests import tiny
from tests.engines import ROWS, fresh_model, loader_of, read_files, settings_of, whole_state, write_files
from tests.ranks import world
from tests.sessions import bare_session, train_steps

STEPS = 20
PLAN = ("phases.main.steps=20", "phases.main.warmup_steps=5", "phases.main.weight_decay=0.1")


Numbers = tuple[list[float], list[float], dict[str, torch.Tensor]]  # losses, gradient norms, weights


def engine_losses(settings: Config, precision: str, steps: int) -> Numbers:
    """Those of `steps` real training steps; runs on every rank."""
    from smoltrain.engine.build_engine import build_engine

    here = world()
    wrapped = build_engine(fresh_model(settings), settings, here, precision=precision, accumulation=2)
    loader = loader_of(settings, here.rank, here.size)
    results = train_steps(range(1, steps + 1), bare_session(settings, wrapped, loader))
    metrics = [result.metrics for result in results]
    losses = [step["train/loss_nats_per_token"] for step in metrics]
    norms = [step["train/grad_norm_before_clipping"] for step in metrics]
    return losses, norms, wrapped.weights(keep=True)


def plain_groups(
    settings: Config, masters: dict[str, torch.nn.Parameter]
) -> list[tuple[torch.optim.Optimizer, bool, float]]:
    """Each parameter group's own torch optimizer, whether it decays, and its learning rate as a multiple of the plan's.

    What is whose is told from the names of our decoder.
    """
    section = settings.optimizer
    matrices = [p for p in masters.values() if p.dim() >= 2]
    vectors = [p for p in masters.values() if p.dim() < 2]

    def adamw(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, betas=(section.beta1, section.beta2), eps=section.eps)

    if section.kind == "adamw":
        return [(adamw(matrices), True, 1.0), (adamw(vectors), False, 1.0)]
    hidden = [p for name, p in masters.items() if name.endswith("_proj.weight")]
    tables = [p for name, p in masters.items() if name.startswith(("embed_", "lm_head"))]
    assert len(hidden) + len(tables) == len(matrices)
    muon = torch.optim.Muon(
        hidden, momentum=section.momentum, ns_steps=section.newton_schulz_steps, adjust_lr_fn="match_rms_adamw"
    )
    return [(muon, True, 1.0), (adamw(tables), True, section.embedding_lr_factor), (adamw(vectors), False, 1.0)]


def plain_losses(settings: Config, bf16: bool, size: int) -> Numbers:
    """The same by hand: bf16 weights under fp32 masters (or fp32 alone), fp32 accumulation, clipping, AdamW."""
    net = fresh_model(settings)
    if bf16:
        net.to(torch.bfloat16)
    parameters = dict(net.named_parameters())
    masters = {name: torch.nn.Parameter(p.detach().float().clone()) for name, p in parameters.items()}
    groups = plain_groups(settings, masters)
    loaders = [loader_of(settings, rank, size) for rank in range(size)]
    plan, losses, norms = Plan(settings.phases), [], []
    for step in range(1, STEPS + 1):
        taken = [loader.fetch_step_rows() for loader in loaders]
        totals = loaders[0].unpack_totals(torch.tensor([rows.counts for rows in taken]).sum(0).tolist())
        num_tokens, total = totals.num_targets, 0.0
        sums = {name: torch.zeros_like(p) for name, p in masters.items()}
        for micro in zip(*(rows.micro_batches for rows in taken), strict=True):
            mean = {name: torch.zeros_like(p) for name, p in masters.items()}  # over the ranks, as ZeRO-2 adds it up
            for batch in micro:
                loss = net(batch.ids_BT, batch.labels_BT)
                total += float(loss.detach().double())
                (loss * (size / num_tokens)).backward()
                for name, p in parameters.items():
                    mean[name] += p.grad.float() / size
                    p.grad = None
            for name in sums:
                sums[name] += mean[name]
        norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in sums.values())))
        shrink = (
            1.0 / max(1.0, (norms[-1] + 1e-6) / settings.optimizer.gradient_clipping)
            if settings.optimizer.gradient_clipping
            else 1.0
        )
        for name, master in masters.items():
            master.grad = sums[name] * shrink
        for torch_optimizer, decays, factor in groups:
            (group,) = torch_optimizer.param_groups
            group["lr"] = plan.lr(step) * factor
            group["weight_decay"] = plan.weight_decay(step) if decays else 0.0
            torch_optimizer.step()
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(masters[name])
        losses.append(total / num_tokens)
        for loader in loaders:
            loader.mark_consumed(totals)
    return losses, norms, {name: p.detach() for name, p in parameters.items()}


@functools.cache
def plain_run(size: int, *options: str) -> Numbers:
    """plain_losses of the tiny run under these options. How DeepSpeed is to reduce means nothing to it."""
    with tempfile.TemporaryDirectory() as folder:
        settings = tiny.load(Path(folder), *PLAN, *options)
        prepare_run_data(settings)
        return plain_losses(settings, bf16=settings.engine.precision == "bf16", size=size)


def furthest(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].float() - theirs[name].float()).abs().max()) for name in ours)


@pytest.mark.parametrize(
    ("stage", "reduce"), [(0, "auto"), (1, "step"), (1, "micro_batch"), (2, "step"), (2, "micro_batch"), (3, "auto")]
)
def test_fp32_equals_plain_torch_at_every_zero_stage(tmp_path: Path, ranks: Any, stage: int, reduce: str) -> None:
    ways = (f"engine.ds_config=zero{stage}", f"engine.reduce_gradients={reduce}")
    settings = tiny.load(tmp_path, *PLAN, "engine.precision=fp32", *ways)
    prepare_run_data(settings)
    expected, expected_norms, expected_weights = plain_run(2, "engine.precision=fp32")
    for losses, norms, weights in ranks(2).run(engine_losses, settings, "fp32", STEPS):
        assert losses == pytest.approx(expected, abs=1e-6)
        assert norms == pytest.approx(expected_norms, rel=1e-5)
        assert furthest(weights, expected_weights) < 1e-5
    assert expected[-1] < expected[0] - 0.5, "the reference itself must learn, or agreement proves nothing"


# Clipping multiplies by a norm that DeepSpeed rounds to fp32: one unit in the last place of a master weight then now
# and then falls on the other side of a bf16 rounding, which is 4e-3 of that weight. Without it nothing may differ.
@pytest.mark.parametrize(("clipping", "tolerance"), [pytest.param(0.0, 1e-8, marks=pytest.mark.slow), (1.0, 5e-4)])
@pytest.mark.parametrize(
    ("stage", "reduce"), [pytest.param(1, "auto", marks=pytest.mark.slow), (2, "step"), (2, "micro_batch")]
)
def test_bf16_with_fp32_accumulation_equals_plain_torch(
    tmp_path: Path, ranks: Any, stage: int, reduce: str, clipping: float, tolerance: float
) -> None:
    options = ("engine.precision=bf16", f"optimizer.gradient_clipping={clipping}")
    ways = (f"engine.ds_config=zero{stage}", f"engine.reduce_gradients={reduce}")
    settings = tiny.load(tmp_path, *PLAN, *options, *ways)
    prepare_run_data(settings)
    expected, expected_norms, expected_weights = plain_run(2, *options)
    for losses, norms, weights in ranks(2).run(engine_losses, settings, "bf16", STEPS):
        assert losses == pytest.approx(expected, rel=tolerance)
        assert norms == pytest.approx(expected_norms, rel=max(tolerance, 1e-6) * 50)
        assert furthest(weights, expected_weights) <= tolerance * 50
    assert expected[-1] < expected[0] - 0.5
    assert any(norm > clipping for norm in expected_norms), "clipping must have had something to do"


# ---- any world and stage to any other, with the model and the loader of a run


def run_of(settings: Config) -> tuple[Any, Loader]:
    """An engine, and the loader of the same rows on any number of ranks."""
    from smoltrain.engine.build_engine import build_engine

    here, accumulation = world(), ROWS // world().size
    precision = settings.engine.precision
    wrapped = build_engine(fresh_model(settings), settings, here, precision=precision, accumulation=accumulation)
    return wrapped, loader_of(settings, here.rank, here.size, accumulation)


def go_on(settings: Config, wrapped: Any, loader: Loader, first: int, last: int) -> tuple[list[float], list[str]]:
    """The losses and the ledger of steps first..last."""

    results = train_steps(range(first, last + 1), bare_session(settings, wrapped, loader))
    metrics = [result.metrics for result in results]
    return [step["train/loss_nats_per_token"] for step in metrics], [step["data/ledger"] for step in metrics]


def write(settings: Config, folder: Path) -> tuple[dict[str, list[Any]], tuple[list[float], list[str]]]:
    """Three steps, what a checkpoint keeps of engine and loader, and five steps more."""
    wrapped, loader = run_of(settings)
    go_on(settings, wrapped, loader, 1, 3)
    write_files(wrapped, folder)
    state = merge_loader_states(world().gather(loader.state()))
    world().run_on_first_rank(lambda: (folder / "loader.json").write_text(json.dumps(state)))
    return whole_state(wrapped), go_on(settings, wrapped, loader, 4, 8)


def read(settings: Config, folder: Path, stage: int) -> tuple[dict[str, list[Any]], tuple[list[float], list[str]]]:
    """What a fresh engine has after restoring what `stage` wrote, and five steps more."""
    wrapped, loader = run_of(settings)
    read_files(wrapped, folder, stage)
    loader.load_state(json.loads((folder / "loader.json").read_text()))
    return whole_state(wrapped), go_on(settings, wrapped, loader, 4, 8)


def assert_elastic(
    tmp_path: Path, ranks: Any, old: int, old_stage: int, readers: list[tuple[int, int]], by: str = "auto"
) -> None:
    """What `old` ranks wrote is read by each (ranks, stage): bitwise, then losses within 1e-6 and the same rows.

    `by`: who reduces the readers' gradients.
    """
    settings = settings_of(tmp_path, old_stage, "fp32")
    prepare_run_data(settings)
    expected, (losses, ledger) = ranks(old).run(write, settings, tmp_path / "old")[0]
    assert losses[-1] < losses[0] - 0.1, "a run that stands still proves nothing"
    for size, stage in readers:
        found = ranks(size).run(read, settings_of(tmp_path, stage, "fp32", by), tmp_path / "old", old_stage)
        for state, (losses_after, ledger_after) in found:
            assert state == expected, f"{size} ranks under ZeRO-{stage}"
            assert losses_after == pytest.approx(losses, abs=1e-6), f"{size} ranks under ZeRO-{stage}"
            assert ledger_after == ledger


@pytest.mark.parametrize(
    ("old", "old_stage", "new", "new_stage", "by"),
    [(2, 3, 1, 2, "step"), (2, 3, 1, 2, "micro_batch"), pytest.param(1, 1, 2, 3, "auto", marks=pytest.mark.slow)],
)
def test_a_run_goes_on_on_another_world_under_another_stage(
    tmp_path: Path, ranks: Any, old: int, old_stage: int, new: int, new_stage: int, by: str
) -> None:
    assert_elastic(tmp_path, ranks, old, old_stage, [(new, new_stage)], by)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["auto", "micro_batch"])
@pytest.mark.parametrize(("old", "old_stage"), [(3, 3), (4, 1)])
def test_three_and_four_ranks_are_read_by_all(tmp_path: Path, ranks: Any, old: int, old_stage: int, by: str) -> None:
    assert_elastic(tmp_path, ranks, old, old_stage, [(1, 3), (2, 2), (3, 1), (4, 3)], by)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("old_stage", [1, 2, 3])
@pytest.mark.parametrize("old", [1, 2, 3, 4])
def test_every_world_and_stage_goes_on_from_every_other(tmp_path: Path, ranks: Any, old: int, old_stage: int) -> None:
    assert_elastic(tmp_path, ranks, old, old_stage, [(size, stage) for size in (1, 2, 3, 4) for stage in (1, 2, 3)])


@pytest.mark.parametrize(
    ("part", "saw"),
    [
        ({"mics_shard_size": 2}, "saw MiCS ZeRO-3 sharding has been removed"),  # once a part of DeepSpeed
        ({"stages": 2}, "saw DeepSpeedZeroConfig: stages: Extra inputs are not permitted"),
        ({"reduce_bucket_size": -1}, "saw DeepSpeedZeroConfig: reduce_bucket_size: Input should be greater than"),
        ({"gradient_predivide_factor": 2.0}, "saw gradient_predivide_factor != 1.0 is not yet supported with ZeRO-2"),
    ],
)
def test_a_config_that_deepspeed_refuses_is_one_readable_line(
    tmp_path: Path, ranks: Any, part: dict[str, Any], saw: str
) -> None:
    config = json.loads(Path("ds_configs/zero2.json").read_text())
    whole = config if "gradient_predivide_factor" in part else config["zero_optimization"]
    whole.update(part)
    (tmp_path / "own.json").write_text(json.dumps(config))
    settings = tiny.load(tmp_path, f"engine.ds_config={tmp_path / 'own.json'}")
    with pytest.raises(UserError, match="DeepSpeed refuses its config") as refused:
        ranks(1).run(build, settings)
    assert saw in str(refused.value)
    assert str(refused.value).endswith("own.json")


def build(settings: Config) -> None:
    from smoltrain.engine.build_engine import build_engine

    build_engine(fresh_model(settings), settings, world(), precision="bf16", accumulation=2)
