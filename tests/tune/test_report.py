"""What a reader is told of a grid: the table in 80 columns, the verdicts, the picture's curves, JSON."""

import io
import json
from typing import Any

import pytest
from rich.console import Console

from smoltrain.config.schema import PhaseSection
from smoltrain.tune.grid import Axis, GridPoint
from smoltrain.tune.report import (
    TuneReport,
    build_settings_table,
    choose_drawn_axis,
    describe_loss_column,
    list_verdicts,
    make_curves,
    report_to_json,
)
from smoltrain.tune.result import Edge, Setting, compare_with_best, sort_settings

LR = Axis("phases.main.lr", ("1e-3", "2e-3", "4e-3"), ())
KIND = Axis("optimizer.kind", ("adamw", "muon"), ())
CONTINUATION = PhaseSection(name="continuation", steps=50, lr=2e-4)


def setting(kind: str, lr: str, *losses: float, diverged: dict[int, int] | None = None) -> Setting:
    point = GridPoint((("optimizer.kind", kind), ("phases.main.lr", lr)), (f"optimizer.kind={kind}", f"lr={lr}"))
    return Setting(point, dict(enumerate(losses, 5)), diverged or {}, 1234.5, 100)


def report(*settings: Setting, seeds: int = 2, **more: Any) -> TuneReport:
    rows = sort_settings(settings)
    values: dict[str, Any] = {
        "axes": (KIND, LR), "seeds": tuple(range(5, 5 + seeds)), "steps": (100,), "phase_steps": 100,
        "planned_steps": 150, "settings": rows, "comparisons": compare_with_best(rows), "edges": [],
        "recipes_own": None, "later_phases": (), "rows_note": "the same rows",
    }  # fmt: skip
    return TuneReport(**values | more)


def lines_of_table(told: TuneReport) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=80).print(build_settings_table(told))
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert max(map(len, lines)) <= 80
    return lines


def test_the_table_has_the_best_first():
    rows = [setting("adamw", "2e-3", 5.0, 5.01), setting("muon", "2e-3", 4.5, 4.75), setting("muon", "4e-3", 9.0)]
    rows[2] = setting("muon", "4e-3", 4.0, diverged={6: 12})
    told = report(*rows, recipes_own=rows[0].point)
    head, _, *body = lines_of_table(told)
    assert head.split() == ["kind", "lr", "loss", "spread", "tokens/s"]
    assert [line.split() for line in body] == [
        ["muon", "2e-3", "4.6250", "0.2500", "1,234"],
        ["adamw", "2e-3", "*", "5.0050", "0.0100", "1,234"],
        ["muon", "4e-3", "diverged", "at", "step", "12,", "1", "of", "2", "seeds", "1,234"],
    ]
    assert describe_loss_column(told) == (
        "validation loss after 100 steps, nats per token; the best first; mean of 2 seeds, and the largest less the "
        "smallest of them; * is the recipe as it stands"
    )


def test_one_seed_has_no_spread():
    told = report(setting("adamw", "2e-3", 5.0), seeds=1)
    assert lines_of_table(told)[0].split() == ["kind", "lr", "loss", "tokens/s"]
    assert describe_loss_column(told) == "validation loss after 100 steps, nats per token; the best first"


def test_the_best_is_words_to_paste():
    rows = (setting("muon", "2e-3", 4.5, 4.6), setting("adamw", "2e-3", 5.0, 5.1))
    lines = list(list_verdicts(report(*rows)))
    assert lines[:2] == ["the best, as overrides:", "  optimizer.kind=muon lr=2e-3"]
    assert lines[2] == "the next, kind adamw, lr 2e-3, is 0.5000 worse in the mean, by seed 0.5000 to 0.5000"
    assert len(lines) == 3
    own = list(list_verdicts(report(*rows, recipes_own=rows[0].point)))
    assert own[0] == "the best, which the recipe has already, as overrides:"


def test_what_seeds_do_not_tell_apart_is_said():
    rows = [setting("muon", "2e-3", 4.5, 4.6), setting("adamw", "2e-3", 4.51, 4.59)]
    rows.append(setting("adamw", "4e-3", 5.0, 5.1))
    lines = list(list_verdicts(report(*rows)))
    assert lines[2:] == [
        "not told apart from the best: kind adamw, lr 2e-3: 0.0000 worse in the mean, by seed -0.0100 to 0.0100"
    ]
    many = [setting(f"kind{number}", "2e-3", 4.51, 4.59) for number in range(5)]
    lines = list(list_verdicts(report(rows[0], *many)))
    assert len(lines) == 6
    assert lines[-1] == "... and 2 more that 2 seeds do not tell from it"


def test_one_seed_is_said_to_tell_little():
    lines = list(list_verdicts(report(setting("muon", "2e-3", 4.5), setting("adamw", "2e-3", 4.6), seeds=1)))
    assert lines[2] == (
        "the next, kind adamw, lr 2e-3, is 0.1000 worse with one seed; whether that is more than chance, --seeds 2 or "
        "3 tells"
    )


@pytest.mark.parametrize(
    ("edge", "line"),
    [
        (
            Edge(LR, "4e-3", "8e-3"),
            "WARNING: lr 4e-3 is the largest that was tried, so the best may lie beyond: try 8e-3 too",
        ),
        (
            Edge(LR, "1e-3", "5e-4"),
            "WARNING: lr 1e-3 is the smallest that was tried, so the best may lie beyond: try 5e-4 too",
        ),
        (Edge(LR, "4e-3", None), "WARNING: lr 4e-3 is the largest that was tried, so the best may lie beyond"),
    ],
)
def test_an_edge_is_warned_of(edge: Edge, line: str):
    assert line in list_verdicts(report(setting("muon", edge.value, 4.5, 4.6), edges=[edge]))


@pytest.mark.parametrize(
    ("planned_steps", "warns"), [(1000, True), (201, True), (200, False), (50, False), (None, False)]
)
def test_a_short_horizon_is_warned_of(planned_steps: int | None, warns: bool):
    lines = list(list_verdicts(report(setting("muon", "2e-3", 4.5, 4.6), planned_steps=planned_steps)))
    told = [line for line in lines if "depends on how long a run is" in line]
    assert bool(told) == warns
    if planned_steps == 1000:
        assert told[0].startswith("WARNING: 100 steps are 10% of the plan's 1,000, and the best rate")


def test_phases_that_were_not_trained_are_named():
    lines = list(list_verdicts(report(setting("muon", "2e-3", 4.5, 4.6), later_phases=(CONTINUATION,))))
    assert lines[-1] == "not trained, so not tuned: phases.continuation.lr stays 0.0002"
    other = report(setting("muon", "2e-3", 4.5, 4.6), later_phases=(CONTINUATION,), axes=(KIND,))
    assert not [line for line in list_verdicts(other) if "continuation" in line]


def test_without_a_best_there_is_advice():
    told = report(setting("muon", "2e-3", diverged={5: 3, 6: 4}))
    assert told.best is None
    assert list(list_verdicts(told)) == ["WARNING: every setting diverged: try lower rates, or a longer warm-up"]


def test_the_same_as_json():
    rows = (setting("muon", "2e-3", 4.5, 4.75), setting("adamw", "4e-3", diverged={5: 3, 6: 4}))
    tree = json.loads(json.dumps(report_to_json(report(*rows)), allow_nan=False))
    assert tree["best"] == ["optimizer.kind=muon", "lr=2e-3"]
    assert tree["settings"][0]["losses"] == {"5": 4.5, "6": 4.75}
    assert tree["settings"][0]["settings"] == {"optimizer.kind": "muon", "phases.main.lr": "2e-3"}
    assert tree["settings"][1]["diverged_at"] == {"5": 3, "6": 4}
    assert tree["settings"][1]["loss"] is None
    assert (tree["steps"], tree["seeds"]) == (100, [5, 6])


# --- the picture


def test_a_rate_lies_along_the_picture_before_other_numbers_and_words():
    beta = Axis("optimizer.beta2", ("0.9", "0.95"), ())
    assert choose_drawn_axis((KIND, beta, LR)) == 2
    assert choose_drawn_axis((KIND, beta)) == 1
    assert choose_drawn_axis((KIND,)) == 0


def test_there_is_a_curve_for_each_combination_of_the_other_axes():
    rows = [
        setting("muon", "2e-3", 4.5, 4.7), setting("muon", "1e-3", 5.0, 5.2), setting("adamw", "1e-3", 6.0, 6.2),
        setting("adamw", "4e-3", 9.0, diverged={6: 3}),
    ]  # fmt: skip
    curves, ticks = make_curves(report(*rows))
    assert [curve.label for curve in curves] == ["kind adamw", "kind muon"]
    adamw, muon = curves
    assert muon.means == [(1e-3, pytest.approx(5.1)), (2e-3, pytest.approx(4.6))]
    assert muon.points == [(1e-3, 5.0), (1e-3, 5.2), (2e-3, 4.5), (2e-3, 4.7)]
    assert (adamw.means, adamw.diverged) == ([(1e-3, pytest.approx(6.1))], [4e-3])
    assert adamw.points[-1] == (4e-3, 9.0)
    assert ticks == {1e-3: "1e-3", 2e-3: "2e-3", 4e-3: "4e-3"}


def test_words_lie_along_the_picture_in_order():
    point = GridPoint((("optimizer.kind", "muon"),), ())
    told = report(Setting(point, {5: 4.5}, {}, 1.0, 100), axes=(KIND,), seeds=1)
    assert make_curves(told)[1] == {0.0: "adamw", 1.0: "muon"}
    assert make_curves(told)[0][0].means == [(1.0, 4.5)]
