"""Optimizer state that N ranks wrote under one ZeRO stage and M ranks read under another: every number in its place,
and training goes on from there.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smoltrain.config.load import DS_CONFIGS_FOLDER
from smoltrain.config.schema import Config
from smoltrain.data.rows.loader import Batch
from smoltrain.engine.reshard import (
    MASTER_KEYS,
    OPTIMIZER_KEYS,
    ShardLayout,
    build_shard_layout,
    reshard_optimizer_state,
    source_ranks,
)
from smoltrain.errors import DONE, STOPPED, UserError
from tests import launches, tiny
from tests.ranks import world

ROWS, T, V = 12, 6, 13  # rows per step, tokens per row, vocabulary


# ---- the arithmetic


def deal(segments: list[torch.Tensor], alignment: int, size: int) -> list[torch.Tensor]:
    """Every rank's part of a flat tensor, the plain way: pad each segment, split it, put the rank's pieces together."""
    padded = [torch.nn.functional.pad(x, (0, -len(x) % (alignment * size))) for x in segments]
    return [torch.cat([x.chunk(size)[rank] for x in padded]) for rank in range(size)]


def flat_tensors(
    groups: list[list[str]], values: dict[str, torch.Tensor], gaps: list[list[int]] | None
) -> list[list[torch.Tensor]]:
    """The segments of each flat tensor: with gaps one per group, as ZeRO-1 and ZeRO-2 do, else one per parameter."""
    if gaps is None:
        return [[values[name] for name in group] for group in groups]
    padded = [
        [torch.nn.functional.pad(values[name], (0, gap)) for name, gap in zip(group, some, strict=True)]
        for group, some in zip(groups, gaps, strict=True)
    ]
    return [[torch.cat(group)] for group in padded]


def states(dealt: list[list[torch.Tensor]], stage: int, lean: bool) -> list[dict[str, Any]]:
    """One optimizer state per rank in DeepSpeed's form, from each flat tensor's parts."""
    masters, adamw = (keys[stage == 3] for keys in (MASTER_KEYS, OPTIMIZER_KEYS))
    found = []
    for rank in range(len(dealt[0])):
        parts = [parts[rank] for parts in dealt]
        moments = {i: {"step": torch.tensor(7.0), "exp_avg": part * 2} for i, part in enumerate(parts)}
        last = [int(part.nonzero().max()) + 1 if part.any() else 0 for part in parts]  # no true element is 0
        held = [part[:end] if lean else part for part, end in zip(parts, last, strict=True)]
        own = {"state": moments, "param_groups": [f"of stage {stage}"]}
        found.append({masters: held, adamw: own, "loss_scaler": 2.0**stage, "form": stage})
    return found


@st.composite
def arrangements(draw: st.DrawFn, sizes: dict[str, int]) -> tuple[ShardLayout, list[dict[str, Any]], int]:
    """A way to hold these parameters (any stage, world, order, grouping, gaps), and what its ranks then hold."""
    stage, size = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    names = draw(st.permutations(list(sizes)))
    cuts = sorted(draw(st.sets(st.integers(1, len(names) - 1), max_size=2))) if len(names) > 1 else []
    groups = [names[a:b] for a, b in zip([0, *cuts], [*cuts, len(names)], strict=True)]
    gaps = [[draw(st.integers(0, 7)) for _ in group] for group in groups] if draw(st.booleans()) else None
    values = {name: torch.arange(1.0, n + 1) + 100 * i for i, (name, n) in enumerate(sizes.items())}
    shapes = [{name: torch.Size([sizes[name]]) for name in group} for group in groups]
    filled = None if stage == 3 else gaps or [[0] * len(group) for group in groups]
    segments = flat_tensors(groups, values, filled)
    dealt = [deal(segment, 1 if stage == 3 else 2, size) for segment in segments]
    return build_shard_layout(stage, shapes, gaps, size), states(dealt, stage, draw(st.booleans())), stage


@given(data=st.data(), lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5))
def test_any_world_and_stage_cut_anew_is_what_the_other_would_have_dealt(
    data: st.DataObject, lengths: list[int]
) -> None:
    sizes = {f"p{i}": n for i, n in enumerate(lengths)}
    old, wrote, _ = data.draw(arrangements(sizes))
    new, expected, stage = data.draw(arrangements(sizes))
    masters, adamw = (keys[stage == 3] for keys in (MASTER_KEYS, OPTIMIZER_KEYS))
    for rank, wanted in enumerate(expected):
        needed = {source: wrote[source] for source in source_ranks(old, new, rank)}
        found = reshard_optimizer_state(wanted, needed, old, new, rank)
        assert found.keys() == wanted.keys()
        assert (found["form"], found[adamw]["param_groups"]) == (stage, [f"of stage {stage}"])
        assert found["loss_scaler"] == wrote[0]["loss_scaler"]
        steps = [moments["step"] for moments in found[adamw]["state"].values()]
        assert len({step.data_ptr() for step in steps}) == len(steps), "AdamW counts each up in place"
        for i, moments in wanted[adamw]["state"].items():
            held = wanted[masters][i].tolist()
            assert found[masters][i].tolist()[: len(held)] == held
            assert not any(found[masters][i].tolist()[len(held) :])
            assert found[adamw]["state"][i]["exp_avg"].tolist() == moments["exp_avg"].tolist()
            assert found[adamw]["state"][i]["step"] == 7


def two_groups(size: int, stage: int = 2) -> ShardLayout:
    return build_shard_layout(stage, [{"a": torch.Size([800])}, {"b": torch.Size([80])}], None, size)


def test_a_rank_reads_no_more_shards_than_it_needs() -> None:
    assert [source_ranks(two_groups(8), two_groups(4), rank) for rank in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [source_ranks(two_groups(2), two_groups(4, 3), rank) for rank in range(4)] == [[0], [0], [1], [1]]
    one = [{"a": torch.Size([1])}]
    assert source_ranks(build_shard_layout(1, one, None, 2), build_shard_layout(1, one, None, 4), 3) == [0], (
        "all padding"
    )


def test_what_cannot_be_moved_is_refused_in_words() -> None:
    old, new = two_groups(2), two_groups(1)
    (other,) = states([deal([torch.arange(1.0, 12)], 4, 1)] * 2, 2, lean=False)
    with pytest.raises(UserError, match=r"not partitioned as expected: saw 12 elements of exp_avg, not 400"):
        reshard_optimizer_state(other, {0: other, 1: other}, old, new, 0)
    listed = other | {"base_optimizer_state": []}
    with pytest.raises(UserError, match="not partitioned as expected: saw a list"):
        reshard_optimizer_state(other, {0: listed, 1: listed}, old, new, 0)
    with pytest.raises(UserError, match="of another model: saw b differ"):
        source_ranks(old, build_shard_layout(2, [{"a": torch.Size([800])}, {"b": torch.Size([81])}], None, 1), 0)


def test_before_the_first_update_there_are_no_moments_and_a_foreign_loss_scale_is_left() -> None:
    layout = two_groups(1)
    (wrote,) = states([deal([torch.arange(1.0, n + 1)], 2, 1) for n in (800, 80)], 2, lean=False)
    wrote |= {"base_optimizer_state": {"state": {}}, "loss_scaler": "of another class"}
    (own,) = states([deal([torch.zeros(n)], 2, 1) for n in (800, 80)], 2, lean=False)
    found = reshard_optimizer_state(own, {0: wrote}, layout, layout, 0)
    assert found["base_optimizer_state"]["state"] == {}
    assert found["loss_scaler"] == 4.0
    assert [len(x) for x in found["single_partition_of_fp32_groups"]] == [800, 80]


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


def settings_of(folder: Path, stage: int | str, precision: str, by: str = "auto") -> Config:
    """`by`: who reduces, engine.reduce_gradients; auto is `step` wherever that can be."""
    name = f"zero{stage}" if isinstance(stage, int) else stage
    words = (f"engine.ds_config={name}", f"engine.precision={precision}", f"engine.reduce_gradients={by}")
    return tiny.load(folder, *words, "batch.micro_batch=1", "track.gradients_every=0")


def engine_of(settings: Config, seed: int) -> Any:
    from smoltrain.engine.engine import build_engine

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
            loss = wrapped.forward(Batch(row[None, :-1], row[None, 1:]))
            total += float(loss.detach())
            wrapped.backward(loss * (here.size / (ROWS * T)))
        assert wrapped.update(lr=1e-2, weight_decay=0.1)
        losses.append(here.sum_floats(total)[0] / (ROWS * T))
    return losses


def whole_state(wrapped: Any) -> dict[str, list[Any]]:
    """Master weight, both moments, compute weight of every parameter, gathered; and the step counts."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    optimizer, keys = wrapped._deepspeed.optimizer, ("exp_avg", "exp_avg_sq")
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
    for name, weights in wrapped.weights(keep=True).items():
        found[name].append(weights.tolist())
    inner = getattr(optimizer, "optimizer", optimizer)
    return found | {"step": sorted({float(state["step"]) for state in inner.state.values()})}


def write_files(wrapped: Any, folder: Path) -> None:
    """What a checkpoint would hold of the engine, without the rest of it."""
    for name, state in wrapped.training_state(folder).items():
        torch.save(state, folder / name)
    world().barrier()


def write(settings: Config, folder: Path) -> tuple[dict[str, list[Any]], list[float]]:
    """Three steps, a checkpoint, and the losses of five more."""
    wrapped = engine_of(settings, seed=1)
    train(wrapped, 1, 3)
    write_files(wrapped, folder)
    return whole_state(wrapped), train(wrapped, 4, 8)


def read(settings: Config, folder: Path, stage: int, used: bool = False) -> tuple[dict[str, list[Any]], list[float]]:
    """What an engine, fresh or `used`, has after restoring what `stage` wrote, and the losses of five steps more."""
    wrapped = engine_of(settings, seed=2)
    if used:
        train(wrapped, 11, 12)
    wrapped.load_shards(folder, stage)
    return whole_state(wrapped), train(wrapped, 4, 8)


def pass_on(settings: Config, came: Path, stage: int, went: Path) -> None:
    """Restore, and write again."""
    wrapped = engine_of(settings, seed=2)
    wrapped.load_shards(came, stage)
    write_files(wrapped, went)


def assert_same(wrote: list[Any], found: list[Any], precision: str) -> None:
    expected, losses = wrote[0]
    assert expected["step"] == [3.0]
    assert losses[-1] < 0.999 * losses[0] or losses[-1] > 1.001 * losses[0], "else equal losses prove nothing"
    for state, losses_after in found:
        assert state == expected  # bitwise: these are lists of floats
        assert losses_after[0] == pytest.approx(losses[0], abs=1e-6)
        assert losses_after == pytest.approx(losses, abs=1e-6 if precision == "fp32" else 1e-2)


@pytest.mark.parametrize(
    ("stage", "precision", "by"),
    [(0, "fp32", "auto"), (1, "fp32", "micro_batch"), (1, "bf16", "auto"), (2, "bf16", "step"),
     (2, "bf16", "micro_batch"), (2, "fp32", "step"), (3, "bf16", "auto")],
)  # fmt: skip
def test_two_ranks_and_one_read_each_other(tmp_path: Path, ranks: Any, stage: int, precision: str, by: str) -> None:
    settings = settings_of(tmp_path, stage, precision, by)
    for old, new in ((2, 1), (1, 2)):
        wrote = ranks(old).run(write, settings, tmp_path / f"{old}")
        assert_same(wrote, ranks(new).run(read, settings, tmp_path / f"{old}", stage), precision)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")])
def test_every_world_reads_every_other(tmp_path: Path, ranks: Any, stage: int, precision: str) -> None:
    settings = settings_of(tmp_path, stage, precision)
    for old in (1, 2, 3, 4):
        wrote = ranks(old).run(write, settings, tmp_path / f"{old}")
        for new in (1, 2, 3, 4):
            assert_same(wrote, ranks(new).run(read, settings, tmp_path / f"{old}", stage), precision)


@pytest.mark.parametrize("old_stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_every_sharding_stage_reads_every_other(tmp_path: Path, ranks: Any, old_stage: int, precision: str) -> None:
    wrote = ranks(2).run(write, settings_of(tmp_path, old_stage, precision), tmp_path / "old")
    for new_stage in {1, 2, 3} - {old_stage}:
        settings = settings_of(tmp_path, new_stage, precision)
        for size in (2, 1):
            assert_same(wrote, ranks(size).run(read, settings, tmp_path / "old", old_stage), precision)


@pytest.mark.parametrize(
    ("old_stage", "new_stage", "by"),
    [(1, 1, "auto"), (2, 2, "step"), (2, 2, "micro_batch"), (3, 3, "auto"), (3, 2, "step"), (3, 2, "micro_batch")],
)
def test_an_engine_that_has_trained_goes_back(
    tmp_path: Path, ranks: Any, old_stage: int, new_stage: int, by: str
) -> None:
    wrote = ranks(2).run(write, settings_of(tmp_path, old_stage, "bf16"), tmp_path / "old")
    settings = settings_of(tmp_path, new_stage, "bf16", by)
    assert_same(wrote, ranks(2).run(read, settings, tmp_path / "old", old_stage, True), "bf16")


@pytest.mark.parametrize(
    ("old_stage", "new_stage", "old", "new"), [(2, 2, "bf16", "fp32"), (3, 1, "fp32", "bf16"), (1, 3, "bf16", "fp32")]
)
def test_another_precision_makes_its_weights_of_the_same_masters(
    tmp_path: Path, ranks: Any, old_stage: int, new_stage: int, old: str, new: str
) -> None:
    wrote = ranks(2).run(write, settings_of(tmp_path, old_stage, old), tmp_path / "old")
    for found, losses in ranks(2).run(read, settings_of(tmp_path, new_stage, new), tmp_path / "old", old_stage):
        assert losses == pytest.approx(wrote[0][1], abs=1e-2)
        for name, expected in wrote[0][0].items():
            assert found[name][:3] == expected[:3]
            if name != "step":
                dtype = getattr(torch, {"bf16": "bfloat16", "fp32": "float32"}[new])
                assert found[name][3] == torch.tensor(expected[0]).to(dtype).tolist()


def with_zero(folder: Path, stage: int = 2, **options: Any) -> str:
    """A DeepSpeed config like zero2's or zero3's with other zero_optimization options."""
    tree = json.loads((DS_CONFIGS_FOLDER / f"zero{stage}.json").read_text())
    tree["zero_optimization"] |= options
    path = folder / f"odd-{stage}-{'-'.join(options)}.json"
    path.write_text(json.dumps(tree))
    return str(path)


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        (2, {"round_robin_gradients": True}),  # parameters in another order, which depends on the number of ranks
        pytest.param(2, {"parameter_alignment": True}, marks=pytest.mark.slow),  # gaps between parameters
        pytest.param(3, {"sub_group_size": 30}, marks=pytest.mark.slow),  # a parameter group in several tensors
    ],
)
def test_options_that_lay_the_state_out_in_another_way_may_come_and_go(
    tmp_path: Path, ranks: Any, stage: int, options: dict[str, Any]
) -> None:
    """Only engines without the options are asked: with the first one DeepSpeed gathers under the wrong names."""
    plain, odd = (settings_of(tmp_path, name, "bf16") for name in (stage, with_zero(tmp_path, stage, **options)))
    came = tmp_path / "plain"
    wrote = ranks(2).run(write, plain, came)
    for hop, size in enumerate((2, 2, 1, 2)):
        went = tmp_path / f"hop-{hop}"
        ranks(size).run(pass_on, odd, came, stage, went)
        assert_same(wrote, ranks(1).run(read, plain, went, stage), "bf16")
        came = went
    assert_same(wrote, ranks(2).run(read, settings_of(tmp_path, 5 - stage, "bf16"), came, stage), "bf16")


@pytest.mark.parametrize(("old_stage", "new_stage"), [(0, 2), (3, 0)])
def test_zero_0_neither_reads_the_others_nor_is_read(
    tmp_path: Path, ranks: Any, old_stage: int, new_stage: int
) -> None:
    ranks(1).run(write, settings_of(tmp_path, old_stage, "fp32"), tmp_path / "step-00000003")
    expected = f"step-00000003 is a checkpoint of another ZeRO stage: saw ZeRO-{new_stage}, want ZeRO-{old_stage}"
    with pytest.raises(UserError, match=expected):
        ranks(1).run(read, settings_of(tmp_path, new_stage, "fp32"), tmp_path / "step-00000003", old_stage)


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
