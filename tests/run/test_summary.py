"""The summary of a run, from records made by hand: every number of it is calculated here once more."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from smoltrain.run.summary import describe_run, format_summary, summarise_run
from smoltrain.run.wandb_id import UNDONE_METRICS_FILE
from smoltrain.schedule import Plan
from tests import tiny

TOKENS = 64  # of a step
BEGAN_AT = 1000.0


def step_line(step: int, time_s: float, step_s: float = 2.0, **more: float) -> dict[str, Any]:
    return {
        "step": step, "time_s": time_s, "train/loss_nats_per_token": 5.0, "train/skipped_updates": 0,
        "data/epochs": step / 10, "speed/tokens_per_s": TOKENS / step_s, "speed/step_s": step_s, **more,
    }  # fmt: skip


def validation_line(step: int, time_s: float, loss: float, **more: float) -> dict[str, Any]:
    return {
        "step": step, "time_s": time_s, "validation/loss_nats_per_token": loss,
        "validation/bits_per_byte": loss / 2, **more,
    }  # fmt: skip


# One start of three steps, by the clock: 10 s until the first step, 2 + 4 + 2 s of steps, 3 s of evaluation, 1 s of
# samples, 0.5 s of tasks, 0.5 s of a pause, 1.5 s of closing, and 0.5 s between them that nobody measures.
ONE_START = [
    step_line(1, BEGAN_AT + 12.0, **{"speed/start_s": 10.0, "speed/mfu": 0.5}),
    step_line(2, BEGAN_AT + 16.0, 4.0, **{"speed/mfu": 0.2}),
    step_line(3, BEGAN_AT + 18.5, **{"speed/mfu": 0.5}),
    validation_line(3, BEGAN_AT + 21.5, 4.0, **{"speed/evaluation_s": 3.0}),
    {"step": 3, "time_s": BEGAN_AT + 23.0, "speed/sampling_s": 1.0, "speed/task_evaluation_s": 0.5},
    {"step": 3, "time_s": BEGAN_AT + 23.5, "speed/checkpoint_pause_s": 0.5},
    {"step": 3, "time_s": BEGAN_AT + 25.0, "speed/closing_s": 1.5},
]


def later(lines: list[dict[str, Any]], seconds: float, steps: int = 0) -> list[dict[str, Any]]:
    return [line | {"time_s": line["time_s"] + seconds, "step": line["step"] + steps} for line in lines]


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan(tiny.load(tmp_path).phases)  # of 12 steps


def write(folder: Path, lines: list[dict[str, Any]], undone: list[dict[str, Any]] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    for name, some in (("metrics.jsonl", lines), (UNDONE_METRICS_FILE, undone or [])):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in some))
    return folder


def test_measuring_memorisation_is_a_part_of_its_own(tmp_path: Path, plan: Plan) -> None:
    *before, closing = ONE_START
    measured = {"step": 3, "time_s": BEGAN_AT + 23.5, "speed/memorisation_s": 0.25}
    summary = summarise_run(plan, write(tmp_path / "run", [*before, measured, closing]))
    assert summary.times
    assert (summary.times.parts["memorisation"], summary.times.parts["other"]) == pytest.approx((0.25, 0.25))


def test_communication_is_told_of_several_ranks_and_warned_of_where_it_is_much(tmp_path: Path, plan: Plan) -> None:
    def rows(communication_s: float) -> list[str]:
        told = {"speed/communication_s": communication_s, "speed/communication_mb": 12.62}
        lines = [ONE_START[0], *[line | told for line in ONE_START[1:3]], *ONE_START[3:]]
        summary = summarise_run(plan, write(tmp_path / "run", lines))
        return [row for row in format_summary(summary) if row.startswith(("  communication", "    WARNING"))]

    assert rows(0.6) == ["  communication      20.0% of the steps, 12.6 MB sent by a rank in a step"]
    assert rows(1.2) == [
        "  communication      40.0% of the steps, 12.6 MB sent by a rank in a step",
        "    WARNING          much: more rows per step, or see `smoltrain check-hosts`",
    ]
    assert not rows(0.0)


def test_the_parts_add_up_to_the_wall_clock(tmp_path: Path, plan: Plan) -> None:
    summary = summarise_run(plan, write(tmp_path / "run", ONE_START))
    assert summary.times
    assert summary.times.parts == pytest.approx({
        "starting": 10.0, "steps": 8.0, "evaluation": 3.0, "tasks": 0.5, "sampling": 1.0, "saving": 0.5,
        "closing": 1.5, "steps done again": 0.0, "other": 0.5, "memorisation": 0.0,
    })  # fmt: skip
    assert summary.times.wall_s == pytest.approx(25.0), "from the command's start to the last line"
    assert (summary.times.num_starts, summary.times.num_steps, summary.times.num_tokens) == (1, 3, 3 * TOKENS)
    assert (summary.step, summary.last_step, summary.num_steps, summary.num_tokens) == (3, 12, 3, 3 * TOKENS)
    assert summary.mfu == pytest.approx((0.5 * 2 + 0.2 * 4 + 0.5 * 2) / 8), "over the time of the steps"
    assert summary.num_epochs == 0.3


def test_nobodys_night_between_two_starts_is_counted(tmp_path: Path, plan: Plan) -> None:
    folder = write(tmp_path / "run", [*ONE_START, *later(ONE_START, 40_000.0, steps=3)])
    times = summarise_run(plan, folder).times
    assert times
    assert (times.wall_s, times.num_starts, times.num_tokens) == (pytest.approx(50.0), 2, 6 * TOKENS)
    assert times.parts["starting"] == 20.0


def test_steps_that_were_done_again_took_time_but_give_no_tokens(tmp_path: Path, plan: Plan) -> None:
    """The first start was killed after step 3, of which there was no checkpoint but that of step 1."""
    again = later(ONE_START, 100.0)
    again[0] = again[0] | {"step": 2}
    folder = write(tmp_path / "run", [ONE_START[0], *again[:1], *again[2:]], ONE_START[1:4] * 2)
    times = summarise_run(plan, folder).times
    assert times
    assert times.parts["steps done again"] == 4.0 + 2.0, "once, however often a crash has set the lines aside"
    assert times.parts["steps"] == 2.0 + 2.0 + 2.0
    assert times.parts["evaluation"] == 3.0 + 3.0
    assert times.num_tokens == 3 * TOKENS
    assert times.wall_s == pytest.approx(21.5 + 25.0)


def test_a_start_that_only_makes_up_for_a_validation_counts(tmp_path: Path, plan: Plan) -> None:
    only = validation_line(3, 5000.0, 4.5, **{"speed/evaluation_s": 3.0, "speed/start_s": 9.0})
    times = summarise_run(plan, write(tmp_path / "run", [*ONE_START, only])).times
    assert times
    assert (times.wall_s, times.num_starts) == (pytest.approx(25.0 + 12.0), 2)


def test_a_clock_that_was_set_back_leaves_no_negative_time(tmp_path: Path, plan: Plan) -> None:
    lines = [ONE_START[0], ONE_START[1] | {"time_s": BEGAN_AT + 13.0}]
    times = summarise_run(plan, write(tmp_path / "run", lines)).times
    assert times
    assert times.parts["other"] == 0.0
    assert times.wall_s == 10.0 + 2.0 + 4.0


def test_the_best_and_the_last_validation_with_their_steps(tmp_path: Path, plan: Plan) -> None:
    losses = {4: float("nan"), 8: 3.5, 12: 3.75}
    lines = [step_line(12, 1.0), *(validation_line(step, 1.0, loss) for step, loss in losses.items())]
    summary = summarise_run(plan, write(tmp_path / "run", lines))
    assert summary.best_loss == (8, 3.5)
    assert summary.last_loss == (12, 3.75, 1.875)
    text = "\n".join(format_summary(summary))
    assert "3.7500 nats per token at step 12\n" in text
    assert "\n    the best         3.5000 nats per token at step 8\n" in text
    best = summarise_run(plan, write(tmp_path / "run", lines[:-1]))
    assert "3.5000 nats per token at step 8, the best\n" in "\n".join(format_summary(best))


def test_the_summary_shows_no_older_loss_as_the_last_one(tmp_path: Path, plan: Plan) -> None:
    """Nor as one of the last step, where the validation of that one was forestalled."""
    folder = write(tmp_path / "run", [step_line(8, 1.0), validation_line(8, 1.0, 5.25), step_line(12, 2.0)])
    done, loss, *_ = format_summary(summarise_run(plan, folder))
    assert (done, loss) == ("done: 12 of 12 steps", "  validation loss    5.2500 nats per token at step 8, the best")


def test_what_is_printed(tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [*ONE_START, *later(ONE_START, 40_000.0, steps=3)]
    lines[7]["train/skipped_updates"] = 2
    lines[9]["train/skipped_updates"] = 2
    (write(tmp_path / "run", lines) / "plots").mkdir()
    assert format_summary(summarise_run(plan, Path("run"))) == [
        "done: 6 of 12 steps",
        "  validation loss    4.0000 nats per token at step 6",
        "    the best         4.0000 nats per token at step 3",
        "    bits per byte    2.000 at step 6",
        "  tokens             384 in 6 steps, 0.30 epochs",
        "  tokens/s           24 in the steps, 8 over all the time",
        "  MFU                35.0% in the steps",
        "  skipped updates    2",
        "  time               50.0 s in 2 starts",
        "    starting            20.0 s  40.0%",
        "    steps               16.0 s  32.0%",
        "    evaluation           6.0 s  12.0%",
        "    tasks                1.0 s   2.0%",
        "    sampling             2.0 s   4.0%",
        "    saving               1.0 s   2.0%",
        "    closing              3.0 s   6.0%",
        "    other                1.0 s   2.0%",
        "  weights, metrics   run",
        "  curves             run/plots",
    ]  # fmt: skip


def test_a_long_run_fits_80_columns(tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.executable", str(tmp_path / ".venv" / "bin" / "python"))
    first = step_line(999_999, 1e7, 4e6, **{"speed/start_s": 1e4, "speed/mfu": 0.4123}) | {"speed/tokens_per_s": 12e6}
    lines = [first, validation_line(999_999, 1e7, 12.3456), validation_line(1_000_000, 1e7, 13.3456)]
    folder = write(tmp_path / "smollm-149m-mha-longer", lines)
    text = describe_run(plan, Path(folder.name))
    assert "1,111:06:40" in text, "hours"
    assert [line for line in text.splitlines() if len(line) > 80] == []


def test_an_older_run_without_the_new_names_has_a_summary(tmp_path: Path, plan: Plan) -> None:
    old = [
        {name: value for name, value in line.items() if name not in ("speed/start_s", "speed/mfu")}
        for line in (*ONE_START[:3], validation_line(3, 5.0, 4.0), ONE_START[5])
    ]
    summary = summarise_run(plan, write(tmp_path / "run", old))
    assert summary.times is None
    text = "\n".join(format_summary(summary))
    assert "  time               8.0 s in the steps; older versions wrote down no other" in text
    assert "  tokens/s           24 in the steps\n" in text
    mixed = summarise_run(plan, write(tmp_path / "run", [*old, *later(ONE_START, 40_000.0, steps=3)]))
    assert mixed.times
    assert mixed.times.wall_s == pytest.approx(25.0)
    assert "  time               25.0 s in 1 start; 3 steps of an older version are not in it" in format_summary(mixed)


def test_a_run_without_a_step_or_a_validation_has_a_summary(tmp_path: Path, plan: Plan) -> None:
    text = describe_run(plan, write(tmp_path / "run", []))
    assert text.startswith(
        "done: 0 of 12 steps\n  validation loss    never measured\n  tokens             0 in 0 steps\n"
    )


def test_the_commands_can_be_given_to_a_shell(tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "two words; $HOME", [step_line(12, 1.0)])
    (folder / "wandb" / "offline-run-1").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000012").mkdir(parents=True)
    monkeypatch.setattr("sys.executable", str(tmp_path / "my bin" / "python"))
    monkeypatch.chdir(tmp_path)
    lines = describe_run(plan, folder).split("next:\n")[1].splitlines()
    assert [shlex.split(line) for line in lines[:3]] == [
        ["my bin/smoltrain", "generate", str(folder), "--prompt", "To be"],
        ["my bin/smoltrain", "export", str(folder)],
        ["my bin/wandb", "sync", f"{folder}/wandb/offline-run-*"],
    ]
    program = tmp_path / "my bin" / "smoltrain"
    program.parent.mkdir()
    program.write_text("")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    assert "\n  smoltrain generate " in describe_run(plan, folder), "an environment that is activated"
    assert lines[2].endswith("/wandb/offline-run-*"), "which the shell completes, so it stands outside the quotes"
    assert lines[3] == "  to train longer: one more phase in the recipe, and the same command again"


def test_a_run_that_stopped_after_a_phase_says_how_it_goes_on(tmp_path: Path, plan: Plan) -> None:
    text = describe_run(plan, write(tmp_path / "run", [step_line(8, 1.0)]))
    assert text.endswith("\n  to go on with the other 4 steps: the same command, without run.stop_after")
    assert "sync" not in text


def test_a_run_that_ended_within_a_phase_was_not_told_to(tmp_path: Path, plan: Plan) -> None:
    text = describe_run(plan, write(tmp_path / "run", [step_line(7, 1.0)]))
    assert text.endswith("\nnext:\n  to go on with the other 5 steps: the same command"), (
        "there is no checkpoint to use"
    )
