"""Garbage is collected by hand, and training leaves none that is large."""

import gc
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from smoltrain.config.schema import Config
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.training.garbage import COLLECT_EVERY, collect_between_steps
from tests import tiny
from tests.ranks import world
from tests.sessions import bare_session, train_steps
from tests.training.test_step import engine_for, loader_of


class Cycle:
    """What only the collector frees."""

    alive = 0

    def __init__(self) -> None:
        self.itself = self
        Cycle.alive += 1

    def __del__(self) -> None:
        Cycle.alive -= 1


def test_nothing_is_collected_but_by_hand() -> None:
    with collect_between_steps() as collect:
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 0
        for step in range(1, COLLECT_EVERY):
            Cycle()
            collect(step)
        assert Cycle.alive == COLLECT_EVERY - 1
        collect(COLLECT_EVERY)
        assert Cycle.alive == 0
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0, "a rewind must find the engine that it leaves"


def test_python_collects_by_itself_again_after_an_error() -> None:
    try:
        with collect_between_steps():
            raise ValueError
    except ValueError:
        pass
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def tensors_left_by_a_step(settings: Config) -> list[tuple[int, ...]]:
    """The shapes of tensors that a step makes and leaves to the collector."""
    here, wrapped = world(), engine_for(settings, settings.engine.precision)
    session = bare_session(settings, wrapped, loader_of(settings, here.rank, here.size))
    train_steps(range(1, 3), session)
    gc.collect()
    # The engine of an earlier test in this process may be let go by any step: its tensors are older than this one.
    older = [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        train_steps(range(3, 4), session)
        gc.collect()
        left = [one for one in gc.garbage if isinstance(one, torch.Tensor)]
        known = {id(one) for one in older}
        return [tuple(one.shape) for one in left if id(one) not in known]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def leave_a_mess() -> None:
    """What tests have left in the processes that they share."""
    os.environ["LEFT"] = "1"
    os.chdir("/")
    warnings.simplefilter("ignore")
    functional: Any = torch.nn.functional
    functional.linear = functional.bilinear
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.use_deterministic_algorithms(True)
    torch.set_grad_enabled(False)
    torch.manual_seed(7)
    gc.disable()
    Cycle()


def look_around() -> list[Any]:
    return [
        dict(os.environ), Path.cwd(), list(warnings.filters), torch.nn.functional.linear.__name__,
        torch.get_default_dtype(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(),
        torch.is_grad_enabled(), torch.initial_seed(), gc.isenabled(), Cycle.alive,
    ]  # fmt: skip


def test_what_a_test_leaves_in_its_ranks_is_gone_for_the_next(ranks: Any) -> None:
    """See tests/ranks.py: one that fails alone, or in another order only, costs a day."""
    ranks(2).run(look_around)
    before = ranks(2).run(look_around)
    ranks(2).run(leave_a_mess)
    assert ranks(2).run(look_around) == before


def test_a_step_leaves_no_tensor_to_the_collector(tmp_path: Path, ranks: Any) -> None:
    """Else a hundred steps of activations would wait for it."""
    for stage, recompute in ((2, "none"), (2, "full"), (3, "none")):
        words = (
            f"engine.ds_config=zero{stage}", "engine.precision=fp32", f"engine.gradient_checkpointing={recompute}",
            "track.gradients_every=1",
        )  # fmt: skip
        settings = tiny.load(tmp_path, *words)
        prepare_run_data(settings)
        assert ranks(2).run(tensors_left_by_a_step, settings) == [[], []], words
