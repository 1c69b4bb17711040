"""What opens a session refuses without a trace, and publishes what is being written before it leaves."""

from types import SimpleNamespace
from typing import Any

import pytest

from smoltrain.errors import Problem, TrainingStopped, UserError
from smoltrain.training.open_session import _unlink_index_on_refusal, publish_pending_on_error
from smoltrain.training.spikes import Rewind
from tests import tiny


@pytest.mark.parametrize("error", [Rewind("back"), TrainingStopped("nan"), UserError(Problem("a", "b", "c", "d"))])
def test_what_is_being_written_is_published_before_all_leave(error: Exception) -> None:
    finished: list[str] = []
    saver: Any = SimpleNamespace(finish=lambda: finished.append("published"))
    with pytest.raises(type(error)), publish_pending_on_error(saver):
        raise error
    assert finished == ["published"]


def test_an_error_of_one_rank_publishes_nothing() -> None:
    """Publishing is collective, and the others do not come."""
    finished: list[str] = []
    saver: Any = SimpleNamespace(finish=lambda: finished.append("published"))
    with pytest.raises(OSError, match="full"), publish_pending_on_error(saver):
        raise OSError("the disk is full")
    assert not finished


@pytest.mark.parametrize("began", [False, True])
def test_a_start_that_is_refused_binds_nobody_unless_the_run_began(tmp_path: Any, began: bool) -> None:
    settings = tiny.load(tmp_path)
    index = settings.run_folder / "data" / "index.json"
    index.parent.mkdir(parents=True)
    index.write_text("{}")
    if began:
        (settings.run_folder / "config.yaml").write_text("")
    world: Any = SimpleNamespace(is_first=True)
    with pytest.raises(UserError), _unlink_index_on_refusal(settings, world):
        raise UserError(Problem("a", "b", "c", "d"))
    assert index.exists() == began
