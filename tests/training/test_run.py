"""run_training: who works out the start, what a rewind does, and a stop that comes when all is done."""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from smoltrain.errors import DONE, STOPPED, RankTrainingStopped
from smoltrain.schedule import Plan
from smoltrain.training import run
from smoltrain.training.spikes import Rewind
from tests import tiny


@pytest.fixture
def story(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A world of one whose parts write down what is asked of them; `loops` are what each run of the loop does."""
    config = tiny.load(tmp_path)
    words: list[str] = []
    loops: list[Callable[[], int]] = []
    reason: list[str | None] = [None]
    world = SimpleNamespace(
        is_first=True,
        rank=0,
        size=1,
        device=torch.device("cpu"),
        num_machines=1,
        run_on_first_rank=lambda work, **_: work(),
    )
    start = SimpleNamespace(
        has_work=True,
        point=SimpleNamespace(step=0, checkpoint=None),
        num_ranks=1,
        config=config,
        plan=Plan(config.phases),
        last_step=12,
        requested=config,
    )
    begun: list[dict[str, Any]] = []

    def begin_run(*_: Any, **known: Any) -> Any:
        words.append("begin")
        begun.append(known)
        return start

    @contextlib.contextmanager
    def open_session(*_: Any) -> Iterator[Any]:
        words.append("open")
        plan = Plan(config.phases)
        yield SimpleNamespace(
            plan=plan, folder=SimpleNamespace(path=config.run_folder), tracker=SimpleNamespace(say_summary=print)
        )
        words.append("close")

    monkeypatch.setattr(run, "StopFlag", lambda: None)
    monkeypatch.setattr(run, "open_world", lambda *_: world)
    monkeypatch.setattr(run, "lock_run_folder", lambda _: words.append("lock"))
    monkeypatch.setattr(run, "begin_run", begin_run)
    monkeypatch.setattr(run, "open_session", open_session)
    monkeypatch.setattr(run, "run_loop", lambda _: loops.pop(0)())
    monkeypatch.setattr(run, "gather_stop_reason", lambda *_: reason[0])
    return SimpleNamespace(config=config, words=words, loops=loops, start=start, reason=reason, begun=begun)


def test_without_a_supervisor_the_first_rank_locks_and_begins(story: Any) -> None:
    story.loops.append(lambda: DONE)
    assert run.run_training(story.config, began_at=5.0) == DONE
    assert story.words == ["lock", "begin", "open", "close"]
    assert story.begun == [{"began_at": 5.0}]


def test_the_summary_is_printed_by_whoever_started_the_ranks(story: Any, capsys: pytest.CaptureFixture[str]) -> None:
    story.loops += [lambda: DONE, lambda: DONE, lambda: STOPPED]
    run.run_training(story.config)
    assert "done: 0 of 12 steps" in capsys.readouterr().out
    run.run_training(story.config, story.start)
    assert "done: " not in capsys.readouterr().out, "its supervisor prints it after the last phase"
    run.run_training(story.config)
    assert "done: " not in capsys.readouterr().out, "it has stopped before"


def test_what_a_supervisor_hands_over_is_not_worked_out_again(story: Any) -> None:
    story.loops.append(lambda: DONE)
    assert run.run_training(story.config, story.start) == DONE
    assert story.words == ["open", "close"]


def test_a_rewind_begins_anew_from_what_is_on_disk(story: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def meet_a_spike() -> int:
        raise Rewind("rewind 1 of at most 3")

    story.loops += [meet_a_spike, lambda: DONE]
    assert run.run_training(story.config, story.start) == DONE
    assert story.words == ["open", "begin", "open", "close"], "under the lock that is held already"
    assert "rewind 1 of at most 3" in capsys.readouterr().out
    assert story.begun == [{"before": story.start}], "what it has measured stays, the time begins anew"


def test_a_run_without_work_opens_nothing(story: Any, capsys: pytest.CaptureFixture[str]) -> None:
    story.start.has_work = False
    story.start.point.step = 12
    assert run.run_training(story.config) == DONE
    assert story.words == ["lock", "begin"]
    assert "the plan is complete (12 steps); nothing to do" in capsys.readouterr().out
    story.start.point.step = 10
    story.start.last_step = 8  # run.stop_after=main, of a run that has gone on since
    assert run.run_training(story.config) == DONE
    assert "phase main is complete (step 8 of 12), and the run is at step 10; nothing" in capsys.readouterr().out


def test_a_stop_that_comes_while_everything_is_closed_counts(story: Any, capsys: pytest.CaptureFixture[str]) -> None:
    story.loops.append(lambda: DONE)
    story.reason[0] = "SIGTERM"
    assert run.run_training(story.config, story.start) == STOPPED
    said = "stopped at the end of the last step (SIGTERM); the same command goes on from there"
    assert said in capsys.readouterr().out


def test_a_file_that_one_rank_cannot_write_ends_it_in_one_line(story: Any) -> None:
    def fill_the_disk() -> int:
        raise OSError(28, "No space left on device")

    story.loops.append(fill_the_disk)
    with pytest.raises(RankTrainingStopped, match=r"rank 0: .*No space left on device; there is no checkpoint"):
        run.run_training(story.config, story.start)
