"""Gradients that are reduced once per step, against DeepSpeed's own reduction after each micro-batch."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from smoltrain.config.schema import Config
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.distributed.world import World
from smoltrain.errors import UserError
from tests import tiny
from tests.device_ops import DeviceOps
from tests.engine.test_engine import PLAN
from tests.engines import fresh_model, loader_of, read_files, refuse, write_files
from tests.ranks import world
from tests.sessions import bare_session, train_steps


def settings_of(folder: Path, *options: str) -> Config:
    settings = tiny.load(folder, *PLAN, *options)
    prepare_run_data(settings)
    return settings


def wrap(settings: Config, compiles: bool = False) -> Any:
    from smoltrain.engine.build_engine import build_engine

    precision, accumulation = settings.engine.precision, settings.batch.accumulation or 1
    return build_engine(
        fresh_model(settings), settings, world(), precision=precision, accumulation=accumulation, compiles=compiles
    )


def trained(settings: Config, steps: int, compiles: bool) -> tuple[str, list[float], dict[str, torch.Tensor]]:
    """(when gradients were reduced, losses, weights) after real steps; runs on every rank."""

    here, wrapped = world(), wrap(settings, compiles)
    loader = loader_of(settings, here.rank, here.size)
    results = train_steps(range(1, steps + 1), bare_session(settings, wrapped, loader))
    losses = [result.metrics["train/loss_nats_per_token"] for result in results]
    return wrapped.reduction, losses, wrapped.weights(keep=True)


def reductions(settings: Config) -> tuple[str, list[int]]:
    """(what is said, how many collectives there were in each of a step's backward passes); runs on every rank."""
    here, wrapped = world(), wrap(settings)
    loader = loader_of(settings, here.rank, here.size)
    loader.wait_until_ready(60)
    counts = []
    for batch in loader.fetch_step_rows().micro_batches:
        loss = wrapped.forward(batch)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            wrapped.backward(loss)
        counts.append(sum(event.name.startswith("gloo:") for event in seen.events() or ()))
    refuse(wrapped)
    return wrapped.reduction, counts


@pytest.mark.parametrize(
    ("stage", "precision", "asked", "each"),
    [
        (0, "fp32", "auto", False), (1, "fp32", "micro_batch", False), (1, "bf16", "auto", False),
        (1, "fp32", "step", False), (2, "fp32", "micro_batch", True), (2, "bf16", "step", False),
        (3, "bf16", "auto", True),
    ],
)  # fmt: skip
def test_the_line_says_when_gradients_are_reduced(
    tmp_path: Path, ranks: Any, stage: int, precision: str, asked: str, each: bool
) -> None:
    words = (f"engine.ds_config=zero{stage}", f"engine.precision={precision}", f"engine.reduce_gradients={asked}")
    settings = settings_of(tmp_path, *words)
    for said, counts in ranks(2).run(reductions, settings):
        assert said.startswith("after each micro-batch" if each else "once per step")
        first, _ = counts  # of two micro-batches
        assert (first > 0) == each, (said, counts)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_it_trains_as_deepspeed_does(tmp_path: Path, ranks: Any, precision: str) -> None:
    """In bf16 one ulp of a master now and then crosses a rounding boundary of a weight."""
    tolerance = {"fp32": 2e-6, "bf16": 5e-4}[precision]
    options = (f"engine.precision={precision}", "optimizer.gradient_clipping=0.5")
    theirs = ranks(2).run(trained, settings_of(tmp_path, *options, "engine.reduce_gradients=micro_batch"), 12, False)
    ours = ranks(2).run(trained, settings_of(tmp_path, *options, "engine.reduce_gradients=step"), 12, True)
    expected: list[float] = []
    for (how, losses, weights), (other, expected, wanted) in zip(ours, theirs, strict=True):
        assert how == "once per step, through shared memory (as engine.reduce_gradients asks)"
        assert other == "after each micro-batch, by DeepSpeed (as engine.reduce_gradients asks)"
        assert losses == pytest.approx(expected, rel=tolerance)
        for name, value in weights.items():
            torch.testing.assert_close(value.float(), wanted[name].float(), rtol=0, atol=50 * tolerance)
    assert expected[-1] < expected[0] - 0.3


def test_a_lone_micro_batch_on_a_lone_rank_is_not_added_up(tmp_path: Path, ranks: Any) -> None:
    """Its bf16 gradients are the sums: of no other value than in fp32."""
    options = ("engine.precision=bf16", "batch.accumulation=1", "optimizer.gradient_clipping=0.5")
    each, once = (settings_of(tmp_path, *options, f"engine.reduce_gradients={by}") for by in ("micro_batch", "step"))
    [(_, expected, wanted)] = ranks(1).run(trained, each, 12, False)
    [(how, losses, weights)] = ranks(1).run(trained, once, 12, False)
    assert how == "once per step, no communication (one rank) (as engine.reduce_gradients asks)"
    assert losses == pytest.approx(expected, rel=5e-4)
    for name, value in weights.items():
        torch.testing.assert_close(value.float(), wanted[name].float(), rtol=0, atol=0.025)
    [(_, compiled, _)] = ranks(1).run(trained, once, 12, True)
    assert compiled == pytest.approx(expected, rel=5e-4)


def sums_of(settings: Config) -> set[torch.dtype]:
    return {sums.own.dtype for sums in wrap(settings)._steps._sums}


def test_sums_of_more_than_one_are_in_fp32(tmp_path: Path, ranks: Any) -> None:
    alone = settings_of(tmp_path, "engine.precision=bf16", "batch.accumulation=1")
    assert ranks(1).run(sums_of, alone) == [{torch.bfloat16}]
    assert ranks(2).run(sums_of, alone) == [{torch.float32}] * 2
    assert ranks(1).run(sums_of, settings_of(tmp_path, "engine.precision=bf16")) == [{torch.float32}]


def gradients_of(settings: Config) -> tuple[dict[str, torch.Tensor], float, bool, bool]:
    """Gradients by name, their norm, and whether they were dropped and then made again the same; on every rank."""
    wrapped, here = wrap(settings), world()
    loader = loader_of(settings, here.rank, here.size)
    rows = loader.fetch_step_rows()

    def backward() -> None:
        for batch in rows.micro_batches:
            wrapped.backward(wrapped.forward(batch) / 16)

    backward()
    found = {name: gradient.clone() for name, gradient in wrapped.gradients()}
    refuse(wrapped)
    backward()
    again = all(torch.equal(found[name], gradient) for name, gradient in wrapped.gradients())
    applied = wrapped.update(lr=1e-3, weight_decay=0.0)
    return found, wrapped.grad_norm_before_clipping, again, applied


def test_gradients_and_norm_are_those_of_deepspeed(tmp_path: Path, ranks: Any) -> None:
    both = [
        ranks(2).run(gradients_of, settings_of(tmp_path, "engine.precision=fp32", f"engine.reduce_gradients={by}"))
        for by in ("step", "micro_batch")
    ]
    for (ours, norm, again, applied), (theirs, expected, *_) in zip(*both, strict=True):
        assert ours.keys() == theirs.keys()
        for name, gradient in ours.items():
            torch.testing.assert_close(gradient, theirs[name], rtol=1e-5, atol=1e-8)
        assert norm == pytest.approx(expected, rel=1e-6)
        assert again
        assert applied


def gradients_while_a_rank_is_slow(settings: Config) -> dict[str, torch.Tensor]:
    """Those of `gradients_of`, where rank 1 sleeps between being together and reading what the others have.

    What a rank has is gone as soon as it may be: its next backward pass would write there.
    """
    wrapped, here = wrap(settings), world()
    for batch in loader_of(settings, here.rank, here.size).fetch_step_rows().micro_batches:
        wrapped.backward(wrapped.forward(batch) / 16)
    together = World.barrier

    def slow(self: World) -> None:
        together(self)
        time.sleep(0.2 * self.rank)

    World.barrier = slow
    try:
        found = {name: gradient.clone() for name, gradient in wrapped.gradients()}
        for sums in wrapped._steps.gradient_sums():
            sums.zero_()
    finally:
        World.barrier = together
    return found


def test_a_rank_that_goes_on_waits_for_one_that_still_reads(tmp_path: Path, ranks: Any) -> None:
    settings = settings_of(tmp_path, "engine.precision=fp32", "engine.reduce_gradients=step")
    both = zip(
        ranks(2).run(gradients_while_a_rank_is_slow, settings), ranks(2).run(gradients_of, settings), strict=True
    )
    for slowly, (quickly, *_) in both:
        for name, gradient in slowly.items():
            assert torch.equal(gradient, quickly[name]), name


class Unused(torch.nn.Module):
    """A parameter that some forwards do not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.both = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.second(self.first(x)) if self.both else self.first(x)).square().sum()


def without_the_second(settings: Config) -> list[float]:
    """Gradient norms of the second layer: reached, not reached, reached; runs on every rank."""
    from smoltrain.engine.build_engine import build_engine

    net = Unused()
    wrapped = build_engine(net, settings, world(), precision="fp32", accumulation=1)
    norms = []
    for both in (True, False, True):
        wrapped.module.both = both
        wrapped.backward(wrapped.module(torch.ones(2, 4)))
        norms.append(float(dict(wrapped.gradients())["second.weight"].norm()))
        wrapped.update(lr=0.0, weight_decay=0.0)
    return norms


@pytest.mark.parametrize("by", ["step", "micro_batch"])
def test_what_backward_did_not_reach_has_no_gradient_of_the_step_before(tmp_path: Path, ranks: Any, by: str) -> None:
    settings = settings_of(tmp_path, "engine.precision=fp32", "batch.accumulation=1", f"engine.reduce_gradients={by}")
    for first, second, third in ranks(2).run(without_the_second, settings):
        assert first > 0
        assert second == 0
        assert third > 0


def write(settings: Config, folder: Path) -> None:
    wrapped = wrap(settings)
    loader = loader_of(settings, world().rank, world().size)
    steps(settings, wrapped, loader, 1, 3)
    write_files(wrapped, folder)


def read(settings: Config, folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Three steps after what was written; runs on every rank."""
    wrapped = wrap(settings)
    loader = loader_of(settings, world().rank, world().size)
    read_files(wrapped, folder, 2)
    losses = steps(settings, wrapped, loader, 4, 6)
    return losses, wrapped.weights(keep=True)


def steps(settings: Config, wrapped: Any, loader: Any, first: int, last: int) -> list[float]:

    results = train_steps(range(first, last + 1), bare_session(settings, wrapped, loader))
    return [result.metrics["train/loss_nats_per_token"] for result in results]


@pytest.mark.parametrize("writer", ["step", "micro_batch"])
def test_either_way_reads_what_the_other_wrote(tmp_path: Path, ranks: Any, writer: str) -> None:
    both = {
        by: settings_of(tmp_path, "engine.precision=fp32", f"engine.reduce_gradients={by}")
        for by in ("step", "micro_batch")
    }
    ranks(2).run(write, both[writer], tmp_path / "shards")
    ours, theirs = (ranks(2).run(read, settings, tmp_path / "shards") for settings in both.values())
    for (losses, weights), (expected, wanted) in zip(ours, theirs, strict=True):
        assert losses == pytest.approx(expected, abs=1e-6)
        for name, value in weights.items():
            torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-6)


def weights_in_memory(settings: Config) -> tuple[int, int]:
    """Bytes of the storages that parameters and DeepSpeed's links to them lie in, and of the weights; on a rank."""
    wrapped = wrap(settings)
    parameters = list(wrapped.module.parameters())
    links = [link.lp_fragment for p in parameters if (link := getattr(p, "_hp_mapping", None))]
    assert links
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in (*parameters, *links)}
    return sum(storages.values()), sum(p.nbytes for p in parameters)


def test_the_weights_are_there_once(tmp_path: Path, ranks: Any) -> None:
    for held, needed in ranks(2).run(weights_in_memory, settings_of(tmp_path, "engine.precision=bf16")):
        assert needed <= held < 1.1 * needed


def refusal(settings: Config) -> str:
    try:
        wrap(settings)
    except UserError as error:
        return str(error)
    return ""


def test_where_it_cannot_be_it_is_refused_by_name(tmp_path: Path, ranks: Any) -> None:
    settings = settings_of(tmp_path, "engine.precision=fp32", "engine.ds_config=zero3", "engine.reduce_gradients=step")
    [said] = ranks(1).run(refusal, settings)
    assert "gradients cannot be reduced once per step" in said
    assert "engine.reduce_gradients" in said


def test_a_gpu_adds_up_squares_and_sums_in_one_kernel_each() -> None:
    """On the device "meta", which computes nothing: 2^30 elements in 1,024 chunks would be thousands."""
    from smoltrain.engine.once_per_step import _sum_of_squares_eager
    from smoltrain.kernels.fp32_sums import accumulate_fp32

    whole = torch.empty(2**30, device="meta", dtype=torch.bfloat16)
    with DeviceOps() as counts:
        assert _sum_of_squares_eager(whole).dtype == torch.float64
    assert counts.num_kernels == 3, "and the number is widened and squared"
    total = torch.empty(2**30, device="meta")
    with DeviceOps() as counts:
        accumulate_fp32(total, whole)
    assert counts.kernels == {"aten::add_": 1}
