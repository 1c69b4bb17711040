"""The comparison of ideas: what is run, what counts as measured, and what the table calls better."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from benchmarks import ideas
from benchmarks.small_loop import Trial

PAGE = (Path(__file__).parents[2] / "docs" / "results" / "ideas.md").read_text(encoding="utf-8")
BASE = {1: 4.0, 2: 4.02, 3: 4.01}


def rows_of(**losses: dict[int, float]) -> dict[str, ideas.Row]:
    return {row.name: row for row in ideas.make_rows({ideas.BASE: BASE, **losses})}


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ({1: 3.90, 2: 3.93, 3: 3.92}, "better"),
        ({1: 4.10, 2: 4.13, 3: 4.12}, "worse"),
        ({1: 3.90, 2: 4.05, 3: 4.01}, "within its noise"),
        ({1: 4.3}, "loses clearly, not tried again"),
        ({1: 3.9}, "one seed"),
    ],
)
def test_a_verdict_compares_runs_of_the_same_seed(losses: dict[int, float], verdict: str):
    row = rows_of(**{"QK-norm": losses})["QK-norm"]
    assert row.verdict == verdict
    assert row.num_seeds == len(losses)


def test_the_differences_are_those_of_pairs_and_not_of_means():
    row = rows_of(**{"QK-norm": {2: 3.92, 3: 3.91}})["QK-norm"]
    assert row.difference == pytest.approx(-0.10)
    assert row.noise == pytest.approx(0.0)


def test_each_idea_changes_the_base_and_no_two_are_alike():
    trials = [Trial(**changes) for changes in ideas.IDEAS.values()]
    assert len(set(trials)) == len(trials)
    assert trials[0] == Trial()


def test_results_of_other_settings_are_not_counted(tmp_path: Path):
    settings = dataclasses.asdict(Trial(qk_norm=True))
    lines = [
        {"idea": "QK-norm", "seed": 1, "validation": 4.0, "settings": settings},
        {"idea": "QK-norm", "seed": 2, "validation": 4.1, "settings": settings | {"lr": 1.0}},
    ]
    file = tmp_path / ideas.RESULTS
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert ideas.read_losses(file) == {"QK-norm": {1: 4.0}}


def test_only_what_is_missing_is_run_and_what_lost_clearly_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[tuple[int, list[str]]] = []

    def pretend(names: list[str], seed: int, out: Path, workers: int) -> None:
        asked.append((seed, names))
        with (out / ideas.RESULTS).open("a") as file:
            for name in names:
                loss = 4.5 if name == "untied head" else 4.0
                settings = dataclasses.asdict(Trial(**ideas.IDEAS[name]))
                file.write(json.dumps({"idea": name, "seed": seed, "validation": loss, "settings": settings}) + "\n")

    monkeypatch.setattr(ideas, "run_trials", pretend)
    for _ in range(2):
        ideas.benchmark_ideas(tmp_path, seeds=2, workers=1, only=["QK-norm", "untied head"])
    every = [ideas.BASE, "QK-norm", "untied head"]
    assert asked == [(1, every), (2, every[:2]), (1, []), (2, [])]
    assert "| untied head | 1 | 4.500 | +0.500 |  | loses clearly" in (tmp_path / ideas.TABLE).read_text()


def test_the_page_has_every_idea_once_and_its_verdicts_follow_from_its_numbers():
    first_table = PAGE.partition("## What became")[0]
    lines = [line for line in first_table.splitlines() if re.match(r"\| .* \| \d+ \| ", line)]
    names = []
    for line in lines:
        name, seeds, loss, difference, noise, verdict = [cell.strip() for cell in line.strip("|").split("|")]
        names.append(name)
        if name != ideas.BASE:
            row = ideas.Row(name, int(seeds), float(loss), float(difference), float(noise) if noise else None)
            assert verdict == row.verdict, line
    not_run = re.findall(r"^- \*\*Not run\*\*: (.*?)\.$", PAGE, re.MULTILINE | re.DOTALL)
    names += [name for text in not_run for name in " ".join(text.split()).split("; ")]
    assert sorted(names) == sorted(ideas.IDEAS)
