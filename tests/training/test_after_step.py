"""A step is saved once, and a run says how long the slowest rank was busy."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from smoltrain.config.load import load_config
from tests import tiny


def saved_steps(folder: Any) -> list[int]:
    """What is saved where the same step is asked for twice."""
    from smoltrain.training import after_step
    from tests.sessions import bare_session

    steps: list[int] = []
    session = bare_session(tiny.load(folder), None, None)
    session.watchdog = SimpleNamespace(mark=lambda _: None)
    session.saver = SimpleNamespace(start_save=lambda step, *_, **__: steps.append(step) or 0.0)
    session.folder = SimpleNamespace(wandb_id="", identity=None)
    session.tracker = SimpleNamespace(log_metrics=lambda *_: None)
    session.saved_step = 3
    for step in (3, 4, 4, 5):
        after_step.save(session, step)
    return steps


def test_a_step_is_saved_once(tmp_path: Any, ranks: Any) -> None:
    assert ranks(1).run(saved_steps, tmp_path) == [[4, 5]]


def durations_of_a_session() -> list[dict[str, Any]]:
    """What is logged by an evaluation, samples and the end, where rank 1 needs a fifth of a second for each."""
    import time

    import numpy as np

    from smoltrain.training import after_step
    from tests.ranks import world
    from tests.sessions import bare_session

    def work(result: Any) -> Any:
        if world().rank == 1:
            time.sleep(0.2)
        return result

    logged: list[dict[str, Any]] = []
    session = bare_session(load_config("quickstart"), None, None)
    session.start = SimpleNamespace(began_at=time.time() - 100.0, preparation_s=50.0)
    session.loader = SimpleNamespace(
        validation_batches=lambda rows: [], prepared=SimpleNamespace(bytes_per_id=lambda: np.zeros(1))
    )
    session.tracker = SimpleNamespace(
        log_validation=lambda step, loss, bits, durations: logged.append(durations),
        log_samples=lambda step, texts: None,
        log_metrics=lambda step, metrics: logged.append(metrics),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(after_step, "evaluate_loss", lambda *_: work((3.0, 1.5)))
        patch.setattr(after_step, "sample_prompts", lambda _: work([]))
        after_step.record_closing(session, 0, 1.0)  # nothing was done yet, so that there is no start to close
        after_step.validate(session, 4)
        after_step.validate(session, 8)
        after_step.sample(session, 8)
        after_step.record_closing(session, 8, 1.5)
    return logged


def test_durations_are_those_of_the_slowest_rank_and_a_start_is_told_once(ranks: Any) -> None:
    everyones = ranks(2).run(durations_of_a_session)
    for logged in everyones:
        assert [sorted(line) for line in logged] == [
            ["speed/evaluation_s", "speed/preparation_s", "speed/start_s"],
            ["speed/evaluation_s"], ["speed/sampling_s"], ["speed/closing_s"],
        ]  # fmt: skip
        assert all(line["speed/evaluation_s"] >= 0.2 for line in logged[:2])
        assert logged[2]["speed/sampling_s"] >= 0.2
        assert logged[3]["speed/closing_s"] == 1.5
    for line in (1, 2):
        assert everyones[0][line] == everyones[1][line]


def start_by_the_clock() -> list[dict[str, float]]:
    from smoltrain.training import after_step
    from tests.sessions import bare_session

    session = bare_session(load_config("quickstart"), None, None)
    session.start = SimpleNamespace(began_at=1000.0, preparation_s=60.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(after_step.time, "time", lambda: 1110.0)
        return [after_step._measure_start(session, 4.0), after_step._measure_start(session, 4.0)]


def test_a_start_lasts_from_the_command_to_the_first_thing_that_is_done(ranks: Any) -> None:
    assert ranks(1).run(start_by_the_clock) == [[{"speed/start_s": 106.0, "speed/preparation_s": 60.0}, {}]]


def warnings_of_steps(folder: Any, communication_s: list[float]) -> list[tuple[int, str]]:
    """(step, line) of what is warned of in steps of a second, of which so much is communication."""
    from collections import deque

    from smoltrain.training.after_step import record
    from smoltrain.training.step_result import StepResult
    from tests.sessions import bare_session

    warned: list[tuple[int, str]] = []
    session = bare_session(tiny.load(folder), None, None)
    session.start = SimpleNamespace(last_step=len(communication_s))
    session.start_was_logged = True
    session.loader = SimpleNamespace(health=SimpleNamespace(take_notes=list))
    session.recent = deque(maxlen=3)
    for step, seconds in enumerate(communication_s, start=1):
        session.tracker = SimpleNamespace(
            warn_once=lambda _, line, step=step: warned.append((step, line)) if line else None, log_step=lambda *_: None
        )
        numbers = {"speed/step_s": 1.0, "speed/data_wait_share": 0.0, "speed/communication_mb": 7.0}
        record(session, step, StepResult(np.empty(0, np.uint64), metrics=numbers | {"speed/communication_s": seconds}))
    return warned


def test_a_network_is_warned_of_when_a_window_of_steps_has_waited_for_it(tmp_path: Any, ranks: Any) -> None:
    [warned] = ranks(1).run(warnings_of_steps, tmp_path, [0.8, 0.0, 0.0, 0.0, 0.0, 0.8])
    assert [step for step, _ in warned] == [], "the mean of three steps is what counts"
    [warned] = ranks(1).run(warnings_of_steps, tmp_path, [0.9, 0.9, 0.1, 0.1, 0.1])
    assert [step for step, _ in warned] == [3, 4], "the first that is known of three steps"
    assert warned[0][1].startswith("WARNING: 63% of the step is spent in communication between ranks, of which each se")
