"""Optimizer state that N ranks wrote and M ranks read: every number in its place, and training goes on from there."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smoltrain import config, reshape
from smoltrain.data import Batch
from smoltrain.errors import DONE, STOPPED, UserError
from smoltrain.reshape import Layout
from smoltrain.schema import Config
from tests import launches, tiny
from tests.ranks import world

ROWS, T, V = 12, 6, 13  # rows per step, tokens per row, vocabulary


# ---- the arithmetic


def deal(segments: list[torch.Tensor], alignment: int, size: int) -> list[torch.Tensor]:
    """Every rank's part of a flat tensor, the plain way: pad each segment, split it, put the rank's pieces together."""
    padded = [torch.nn.functional.pad(x, (0, -len(x) % (alignment * size))) for x in segments]
    return [torch.cat([x.chunk(size)[rank] for x in padded]) for rank in range(size)]


def states(groups: list[list[torch.Tensor]], alignment: int, size: int, lean: bool) -> list[dict[str, Any]]:
    """One optimizer state per rank, in DeepSpeed's form: ZeRO-1's and ZeRO-2's, or ZeRO-3's with alignment 1."""
    masters, adamw = (reshape.MASTERS[alignment == 1], reshape.ADAMW[alignment == 1])
    dealt = [deal(group, alignment, size) for group in groups]
    found = []
    for rank in range(size):
        parts = [parts[rank] for parts in dealt]
        moments = {i: {"step": torch.tensor(7.0), "exp_avg": part * 2} for i, part in enumerate(parts)}
        held = [part[part != 0] if lean else part for part in parts]  # no true element is 0
        found.append({masters: held, adamw: {"state": moments, "param_groups": ["kept"]}, "overflow": False})
    return found


@given(data=st.data(), old=st.integers(1, 9), new=st.integers(1, 9), stage_3=st.booleans())
def test_any_world_cut_anew_is_what_the_other_world_would_have_dealt(
    data: st.DataObject, old: int, new: int, stage_3: bool
) -> None:
    sizes = st.lists(st.integers(1, 60), min_size=1, max_size=5 if stage_3 else 1)
    lengths = data.draw(st.lists(sizes, min_size=1, max_size=3))
    groups = [[torch.arange(1.0, n + 1) + 100 * i for i, n in enumerate(group)] for group in lengths]
    alignment = 1 if stage_3 else 2
    layouts = [Layout(tuple(group), alignment) for group in lengths]
    wrote = states(groups, alignment, old, lean=not stage_3)
    for rank, expected in enumerate(states(groups, alignment, new, lean=False)):
        needed = {source: wrote[source] for source in reshape.sources(layouts, old, new, rank)}
        found = reshape.shard(needed, layouts, old, new, rank)
        assert found.keys() == expected.keys()
        masters, adamw = reshape.MASTERS[stage_3], reshape.ADAMW[stage_3]
        assert found[adamw]["param_groups"] == ["kept"]
        for i, moments in expected[adamw]["state"].items():
            assert found[masters][i].tolist() == expected[masters][i].tolist()
            assert found[adamw]["state"][i]["exp_avg"].tolist() == moments["exp_avg"].tolist()
            assert found[adamw]["state"][i]["step"] == 7


def test_a_rank_reads_no_more_shards_than_it_needs() -> None:
    layouts = [Layout((800,), 2), Layout((80,), 2)]
    assert [reshape.sources(layouts, 8, 4, rank) for rank in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [reshape.sources(layouts, 2, 4, rank) for rank in range(4)] == [[0], [0], [1], [1]]
    assert reshape.sources([Layout((1,), 2)], 2, 4, 3) == [0], "all padding, but for the step count"


def test_a_layout_that_is_not_deepspeeds_is_noticed() -> None:
    wrote = dict(enumerate(states([[torch.arange(1.0, 12)]], 4, 2, lean=False)))
    with pytest.raises(AssertionError, match="deals exp_avg out in another way"):
        reshape.shard(wrote, [Layout((11,), 2)], 2, 1, 0)


# ---- DeepSpeed itself


class Odd(torch.nn.Module):
    """Tied weights, two parameter groups, sizes that no number of ranks divides: 135 elements decay, 12 do not.

    Without biases: once ZeRO-3 has run in a process, DeepSpeed's own F.linear stays there and rounds them otherwise.
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

    def forward(self, ids_BT: torch.Tensor, labels_BT: torch.Tensor, positions_BT: None) -> torch.Tensor:
        x = self.embed(ids_BT)
        x = x + self.down(torch.tanh(self.norm_up(self.up(self.norm(x)))))
        logits = self.head(x).float().flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels_BT.flatten(), reduction="sum")


def settings_of(folder: Path, stage: int | str, precision: str) -> Config:
    name = f"zero{stage}" if isinstance(stage, int) else stage
    return tiny.load(folder, f"engine.ds_config={name}", f"engine.precision={precision}", "batch.micro_batch=1")


def engine_of(settings: Config, seed: int) -> Any:
    from smoltrain import engine

    torch.manual_seed(seed)
    accumulation = ROWS // world().size
    return engine.wrap(Odd(), settings, world(), precision=settings.engine.precision, accumulation=accumulation)


def train(wrapped: Any, first: int, last: int) -> list[float]:
    """The mean losses of steps first..last, each of the same rows on any number of ranks."""
    here, losses = world(), []
    for step in range(first, last + 1):
        ids = torch.randint(V, (ROWS, T + 1), generator=torch.Generator().manual_seed(step))
        total = 0.0
        for row in ids[here.rank :: here.size]:
            loss = wrapped.forward(Batch(row[None, :-1], row[None, 1:]))
            total += float(loss.detach())
            wrapped.backward(loss * (here.size / (ROWS * T)))
        assert wrapped.update(lr=1e-2, weight_decay=0.1)
        losses.append(here.sum_floats(total)[0] / (ROWS * T))
    return losses


def whole_state(wrapped: Any) -> dict[str, list[Any]]:
    """Master weight, both moments of every parameter, as DeepSpeed gathers them; and the step counts."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    optimizer, keys = wrapped._ds.optimizer, ("exp_avg", "exp_avg_sq")
    if wrapped.stage in (1, 2):
        optimizer._hp_optimizer_states_linked = False  # DeepSpeed finds the moments by name after a step only
        optimizer._lazy_init_hp_params_optimizer_state()
    found: dict[str, list[Any]] = {}
    for name, p in wrapped.module.named_parameters():
        whole: list[Any]
        if wrapped.stage == 0:
            whole = [p, *(optimizer.state[p][key] for key in keys)]
        else:
            whole = [safe_get_full_fp32_param(p), *(safe_get_full_optimizer_state(p, key) for key in keys)]
        found[name] = [x.detach().tolist() for x in whole]
    inner = getattr(optimizer, "optimizer", optimizer)
    return found | {"step": sorted({float(state["step"]) for state in inner.state.values()})}


def write(settings: Config, folder: Path) -> tuple[dict[str, list[Any]], list[float]]:
    """Three steps, a checkpoint, and the losses of three more."""
    wrapped = engine_of(settings, seed=1)
    train(wrapped, 1, 3)
    wrapped.save_shards(folder)
    return whole_state(wrapped), train(wrapped, 4, 6)


def read(settings: Config, folder: Path) -> tuple[dict[str, list[Any]], list[float]]:
    """What a fresh engine has after restoring, and the losses of the next three steps."""
    wrapped = engine_of(settings, seed=2)
    wrapped.load_shards(folder)
    return whole_state(wrapped), train(wrapped, 4, 6)


def assert_same(wrote: list[Any], found: list[Any], precision: str) -> None:
    expected, losses = wrote[0]
    assert expected["step"] == [3.0]
    assert losses[-1] < 0.999 * losses[0] or losses[-1] > 1.001 * losses[0], "else equal losses prove nothing"
    for state, losses_after in found:
        assert state == expected  # bitwise: these are lists of floats
        assert losses_after[0] == pytest.approx(losses[0], abs=1e-6)
        assert losses_after == pytest.approx(losses, abs=1e-6 if precision == "fp32" else 1e-2)


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "bf16"), (2, "fp32"), (3, "bf16")])
def test_two_ranks_and_one_read_each_other(tmp_path: Path, ranks: Any, stage: int, precision: str) -> None:
    settings = settings_of(tmp_path, stage, precision)
    for old, new in ((2, 1), (1, 2)):
        wrote = ranks(old).run(write, settings, tmp_path / f"{old}")
        assert_same(wrote, ranks(new).run(read, settings, tmp_path / f"{old}"), precision)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), *((stage, p) for stage in (1, 2, 3) for p in ("bf16", "fp32"))]
)
def test_every_world_reads_every_other(tmp_path: Path, ranks: Any, stage: int, precision: str) -> None:
    settings = settings_of(tmp_path, stage, precision)
    for old in (1, 2, 3, 4):
        wrote = ranks(old).run(write, settings, tmp_path / f"{old}")
        for new in (1, 2, 3, 4):
            assert_same(wrote, ranks(new).run(read, settings, tmp_path / f"{old}"), precision)


def with_zero(folder: Path, **options: Any) -> str:
    """A DeepSpeed config like zero2's with other zero_optimization options."""
    tree = json.loads((config.DS_CONFIGS / "zero2.json").read_text())
    tree["zero_optimization"] |= options
    path = folder / "odd.json"
    path.write_text(json.dumps(tree))
    return str(path)


@pytest.mark.parametrize(("old_stage", "new_stage"), [(1, 2), (2, 1)])
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_zero_1_and_zero_2_read_each_other(
    tmp_path: Path, ranks: Any, old_stage: int, new_stage: int, precision: str
) -> None:
    wrote = ranks(2).run(write, settings_of(tmp_path, old_stage, precision), tmp_path / "old")
    for size in (2, 1):
        found = ranks(size).run(read, settings_of(tmp_path, new_stage, precision), tmp_path / "old")
        assert_same(wrote, found, precision)


def test_gaps_between_parameters_are_kept(tmp_path: Path, ranks: Any) -> None:
    settings = settings_of(tmp_path, with_zero(tmp_path, parameter_alignment=True), "bf16")
    wrote = ranks(2).run(write, settings, tmp_path / "old")
    assert_same(wrote, ranks(1).run(read, settings, tmp_path / "old"), "bf16")


def test_another_order_of_parameters_is_refused_in_words(tmp_path: Path, ranks: Any) -> None:
    settings = settings_of(tmp_path, with_zero(tmp_path, round_robin_gradients=True), "bf16")
    ranks(2).run(write, settings, tmp_path / "old")
    assert ranks(2).run(read, settings, tmp_path / "old"), "on as many ranks it is the same order"
    with pytest.raises(UserError, match="in another order: saw that of 1 ranks, want that of 2 ranks"):
        ranks(1).run(read, settings, tmp_path / "old")


# ---- the commands


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_moves_from_two_ranks_to_one_and_back(tmp_path: Path) -> None:
    options = ("engine.precision=fp32", "phases.main.steps=60", "run.stop_after=main", "sample.every=0")
    for folder in ("straight", "moved"):
        (tmp_path / folder).mkdir()
    straight, moved = tiny.words(tmp_path / "straight", *options), tiny.words(tmp_path / "moved", *options)
    log, runs = tmp_path / "moved" / "log", [tmp_path / name / "runs" / "quickstart" for name in ("straight", "moved")]
    assert launches.run("smoltrain", straight, tmp_path / "straight" / "log") == DONE
    for launcher, step in (("smoltrain", 10), ("python", 25)):
        process = launches.start(launcher, moved, log)
        launches.wait_for_step(runs[1], step, process)
        launches.interrupt(process)
        assert process.wait(60) == STOPPED
        launches.wait_until_gone(moved)
    assert launches.run("smoltrain", moved, log) == DONE
    first, second = re.findall(r"stopped after step (\d+)", log.read_text())
    assert f"restored step {first} on 1 ranks" in log.read_text()
    assert f"restored step {second} on 2 ranks" in log.read_text()
    losses, losses_moved = (launches.losses(run) for run in runs)
    assert losses_moved == pytest.approx(losses, abs=1e-4)
    ledgers = [[(m["step"], m["data/ledger"]) for m in launches.metrics(run) if "data/ledger" in m] for run in runs]
    assert ledgers[0] == ledgers[1], "the same rows in every step"
