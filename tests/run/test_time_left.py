"""The time that is left: by hand, of a plan of two phases."""

from pathlib import Path

import pytest

from smoltrain.config.schema import Config
from smoltrain.run.time_left import RECENT_STEPS, TimeLeft, count_due
from smoltrain.schedule import Plan
from tests import tiny


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Steps 1-8 and 9-12; evaluated at 4, 8 and 12, sampled at 6, 8 and 12, saved at 3, 6, 8, 9 and 12."""
    return tiny.load(tmp_path)


def test_before_a_step_nobody_knows(config: Config) -> None:
    left = TimeLeft(config, 12)
    left.add({"speed/evaluation_s": 5.0})
    assert left.estimate_s(0) is None
    left.add({"speed/step_s": 2.0})
    assert left.estimate_s(1) == 11 * 2 + 3 * 5


def test_each_part_counts_as_often_as_it_is_still_due(config: Config) -> None:
    left = TimeLeft(config, 12)
    left.add({"speed/step_s": 1.0})
    left.add({"speed/evaluation_s": 100.0})
    left.add({"speed/sampling_s": 1000.0, "speed/memorisation_s": 1000.0})
    left.add({"speed/checkpoint_pause_s": 10_000.0})
    left.add({"speed/closing_s": 100_000.0})
    assert [left.estimate_s(step) for step in (1, 4, 6, 8, 11, 12)] == [
        153_311, 143_208, 132_206, 121_104, 111_101, 100_000,
    ]  # fmt: skip


def test_a_command_that_ends_with_a_phase_counts_no_other(config: Config) -> None:
    left = TimeLeft(config, 8, restarts=True)
    left.add({"speed/step_s": 1.0, "speed/evaluation_s": 100.0, "speed/start_s": 1e6})
    assert left.estimate_s(2) == 6 + 200


def test_new_processes_for_a_phase_take_the_time_of_a_start(config: Config) -> None:
    numbers = {"speed/step_s": 1.0, "speed/start_s": 30.0, "speed/closing_s": 200.0}
    for restarts, expected in ((True, [10 + 30 + 400, 4 + 30 + 400, 3 + 200]), (False, [210, 204, 203])):
        left = TimeLeft(config, 12, restarts=restarts)
        left.add(numbers)
        assert [left.estimate_s(step) for step in (2, 8, 9)] == expected


def test_data_are_prepared_before_the_first_phase_alone(config: Config) -> None:
    left = TimeLeft(config, 12, restarts=True)
    left.add({"speed/step_s": 1.0, "speed/start_s": 3630.0, "speed/preparation_s": 3600.0})
    assert left.estimate_s(2) == 10 + 30


def test_one_slow_step_moves_nothing_and_old_ones_are_forgotten(config: Config) -> None:
    left = TimeLeft(config, 12)
    for seconds in (2.0, 2.0, 900.0, 2.0, 2.5):
        left.add({"speed/step_s": seconds})
    assert left.estimate_s(2) == 10 * 2
    for _ in range(RECENT_STEPS):
        left.add({"speed/step_s": 3.0})
    assert left.estimate_s(2) == 10 * 3


def test_an_earlier_start_tells_of_all_but_its_steps(config: Config) -> None:
    left = TimeLeft(config, 12)
    left.add_past({"speed/step_s": 7.0})
    left.add_past({"speed/evaluation_s": 100.0})
    assert left.estimate_s(8) is None
    left.add({"speed/step_s": 1.0})
    assert left.estimate_s(9) == 3 + 100


def test_without_a_cadence_only_ends_of_phases_are_saved(tmp_path: Path) -> None:
    left = TimeLeft(tiny.load(tmp_path, "checkpoint.every=0", "evaluate.every=0"), 12)
    left.add({"speed/step_s": 1.0, "speed/checkpoint_pause_s": 100.0, "speed/evaluation_s": 1e6})
    assert [left.estimate_s(step) for step in (1, 8, 12)] == [11 + 200, 4 + 100, 0]


@pytest.mark.parametrize("every", [0, 1, 3, 4, 5, 100])
def test_what_is_due_is_counted_as_the_plan_says(config: Config, every: int) -> None:
    plan = Plan(config.phases)
    for after in range(13):
        for until in range(after, 13):
            due = [step for step in range(after + 1, until + 1) if plan.is_due(step, every)]
            assert count_due(plan, every, after, until) == len(due)


def test_tasks_count_at_their_own_cadence(tmp_path: Path) -> None:
    left = TimeLeft(tiny.load(tmp_path, "evaluate.tasks=[arc_easy]", "evaluate.tasks_every=5"), 12)
    left.add({"speed/step_s": 1.0, "speed/task_evaluation_s": 100.0})
    assert left.estimate_s(4) == 8 + 400, "after steps 5, 8, 10 and 12"
