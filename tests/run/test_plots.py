"""The picture of a plan."""

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from smoltrain.config.schema import PhaseSection
from smoltrain.errors import UserError
from smoltrain.run import plots
from smoltrain.run.plots import GridCurve, draw_grid, draw_plan, draw_run
from smoltrain.schedule import Plan

MAIN = PhaseSection(name="main", steps=40, lr=3e-4, schedule="wsd", warmup_steps=5, decay_steps=10)
AFTER = PhaseSection(name="after", steps=3, schedule="continue", weight_decay=0.0)
ONE_STEP = PhaseSection(name="one", steps=1, lr=1e-3, weight_decay=0.0)


@pytest.mark.parametrize("phases", [(MAIN, AFTER), (ONE_STEP,), (MAIN, AFTER, ONE_STEP)])
def test_a_plan_becomes_a_png(tmp_path: Path, phases: tuple[PhaseSection, ...]):
    draw_plan(Plan(phases), tmp_path / "plots" / "plan.png")
    assert size(tmp_path / "plots" / "plan.png") == (1260, 672)


def test_the_title_is_in_the_picture_as_it_is_typed(tmp_path: Path):
    pictures = []
    for title in ("", "quickstart: 43 steps", "a$b_{$"):  # which matplotlib would take for mathematics
        draw_plan(Plan((MAIN, AFTER)), tmp_path / "plan.png", title)
        pictures.append((tmp_path / "plan.png").read_bytes())
    assert len(set(pictures)) == 3


def test_the_same_plan_is_the_same_picture(tmp_path: Path):
    first, second, other = (tmp_path / name for name in ("first.png", "second.png", "other.png"))
    draw_plan(Plan((MAIN, AFTER)), first)
    draw_plan(Plan((MAIN, AFTER)), second)
    draw_plan(Plan((MAIN, ONE_STEP)), other)
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()


def write_metrics(run: Path, num_steps: int, first: int = 1) -> None:
    run.mkdir(parents=True, exist_ok=True)
    lines = [
        {
            "step": n, "train/loss_nats_per_token": 9 / n, "train/lr": 1e-3, "train/grad_norm_before_clipping": 1 / n,
            "speed/tokens_per_s": 5000.0, "data/unique_rows": 16 * n, "data/unique_documents": 3 * n,
            "data/repeat_factor": 1 + n / 99,
        }
        for n in range(first, first + num_steps)
    ]  # fmt: skip
    lines.append({"step": first + num_steps - 1, "validation/loss_nats_per_token": 0.5})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def size(png: Path) -> tuple[int, int]:
    data = png.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", data[16:24])


def test_a_run_becomes_pngs_of_its_curves(tmp_path: Path):
    write_metrics(tmp_path, 43)
    loss, training = draw_run(Plan((MAIN, AFTER)), tmp_path)
    assert (loss.name, training.name) == ("loss.png", "training.png")
    assert size(loss)[0] == size(training)[0] == 1260
    assert size(training)[1] > size(loss)[1]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """What was drawn, loss.png and training.png in turn: to make pictures of them would take seconds."""
    kept: list[Figure] = []
    monkeypatch.setattr(plots, "_save_figure", lambda figure, *_: kept.append(figure))
    return kept


def drawn_numbers(figure: Figure) -> list[list[float]]:
    """Of each curve."""
    return [np.asarray(line.get_ydata()).tolist() for axes in figure.axes for line in axes.lines]


@pytest.mark.parametrize(
    ("name", "in_loss_png"),
    [
        ("train/loss_nats_per_token", True),
        ("validation/loss_nats_per_token", True),
        ("train/lr", False),
        ("train/grad_norm_before_clipping", False),
        ("speed/tokens_per_s", False),
        ("data/unique_rows", False),
        ("data/unique_documents", False),
        ("data/repeat_factor", False),
    ],
)
def test_each_number_is_drawn(tmp_path: Path, figures: list[Figure], name: str, in_loss_png: bool):
    write_metrics(tmp_path, 43)
    draw_run(Plan((MAIN, AFTER)), tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    changed = [line | ({name: line[name] * (1 + line["step"] % 7)} if name in line else {}) for line in lines]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in changed))
    draw_run(Plan((MAIN, AFTER)), tmp_path)
    loss, training, loss_after, training_after = map(drawn_numbers, figures)
    assert (loss != loss_after, training != training_after) == (in_loss_png, True)


def test_a_run_that_counted_no_documents_has_no_panel_of_them(tmp_path: Path, figures: list[Figure]):
    write_metrics(tmp_path, 43)
    draw_run(Plan((MAIN, AFTER)), tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    new = ("data/unique_documents", "data/repeat_factor")
    metrics.write_text("".join(json.dumps({k: v for k, v in x.items() if k not in new}) + "\n" for x in lines))
    draw_run(Plan((MAIN, AFTER)), tmp_path)
    assert figures[3].get_figheight() < figures[1].get_figheight()


def test_a_run_of_another_run_begins_where_it_began(tmp_path: Path):
    write_metrics(tmp_path, 3, first=41)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 44, "train/lo')  # a line in the making
    for png in draw_run(Plan((MAIN, AFTER)), tmp_path):
        assert size(png)[0] == 1260


def test_a_run_whose_losses_are_all_nan_is_drawn(tmp_path: Path):
    write_metrics(tmp_path, 43)
    metrics = tmp_path / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    metrics.write_text(
        "".join(json.dumps({k: v if "loss" not in k else math.nan for k, v in x.items()}) + "\n" for x in lines)
    )
    for png in draw_run(Plan((MAIN, AFTER)), tmp_path):
        assert size(png)[0] == 1260


def test_a_run_without_a_step_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="nothing to draw yet"):
        draw_run(Plan((MAIN,)), tmp_path)


def test_curves_that_cannot_be_written_are_one_line(tmp_path: Path):
    write_metrics(tmp_path, 4)
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "loss.png").mkdir()
    with pytest.raises(UserError, match="the curves cannot be written: saw Is a directory: "):
        draw_run(Plan((MAIN, AFTER)), tmp_path)


def test_a_grid_becomes_a_png(tmp_path: Path):
    rates = {1e-3: "1e-3", 2e-3: "2e-3", 4e-3: "4e-3"}
    adamw = GridCurve("kind adamw", [(1e-3, 5.0), (2e-3, 4.5)], [(1e-3, 5.1), (1e-3, 4.9), (2e-3, 4.5)], [4e-3])
    muon = GridCurve("kind muon", [(1e-3, 4.8)], [(1e-3, 4.8)], [])
    draw_grid([adamw, muon], "phases.main.lr", rates, "quickstart, 60 steps", tmp_path / "new" / "loss.png")
    assert size(tmp_path / "new" / "loss.png") == (980, 616)
    draw_grid([adamw], "phases.main.lr", rates, "quickstart, 60 steps", tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "new" / "loss.png").read_bytes()


@pytest.mark.parametrize("ticks", [{0.0: "adamw", 1.0: "muon"}, {0.0: "0", 0.1: "0.1"}, {2e-3: "2e-3"}])
def test_a_grid_of_words_of_zeros_and_of_one_value_is_drawn(tmp_path: Path, ticks: dict[float, str]):
    curve = GridCurve("", [(value, 5.0) for value in ticks], [], [])
    draw_grid([curve], "optimizer.kind", ticks, "", tmp_path / "loss.png")
    assert size(tmp_path / "loss.png") == (980, 616)


def test_a_grid_whose_runs_all_diverged_is_drawn(tmp_path: Path):
    draw_grid([GridCurve("", [], [], [1.0, 2.0])], "phases.main.lr", {1.0: "1", 2.0: "2"}, "", tmp_path / "loss.png")
    assert size(tmp_path / "loss.png") == (980, 616)
