"""The table of a GPU: its lines, and what a cell that fails, dies or hangs costs the others."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_cells, gpu_table
from benchmarks.gpu_cells import CELLS, FAILED, MEASURED, NO_MEMORY, REFUSED, list_cells, run_cell
from benchmarks.gpu_table import CUT, HEADS, NOT_RUN, format_line, run_table
from benchmarks.gpu_task import FULL, TINY, describe_choices, load_task_config
from benchmarks.peak import Peaks
from benchmarks.peers import PEERS
from smoltrain.errors import Problem, UserError

PEAKS = Peaks(800e12, 4e12, 989e12, "the data sheet of NVIDIA H200")
RESULT = {
    "cell": "ours, as shipped", "outcome": MEASURED, "step_s": 0.5, "first_step_s": 12.0, "peak_gib": 40.0,
    "last_loss": 10.5, "choices": "attention sdpa", "data_wait_share": 0.001, "save_pause_s": 0.08,
}  # fmt: skip
# A process of cells that does to each what its name says.
CHILD = """
import json, sys, time
for name in sys.argv[1:]:
    print("a library says something", flush=True)
    if name == "dies":
        sys.exit(9)
    if name == "hangs":
        time.sleep(60)
    print(json.dumps({"cell": name, "outcome": "failed" if name == "fails" else "measured"}), flush=True)
    if name == "fails":
        sys.exit(1)
"""


@pytest.mark.slow  # it waits for what hangs
def test_a_cell_that_fails_dies_or_hangs_costs_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[list[str]] = []
    popen = subprocess.Popen

    def start(command: list[str], **named: Any) -> Any:
        names = command[4:]
        started.append(names)
        return popen([sys.executable, "-c", CHILD, *names], **named)

    monkeypatch.setattr(gpu_table.subprocess, "Popen", start)
    monkeypatch.setattr(gpu_table, "CELL_LIMIT_S", 6.0)
    names = ["a", "fails", "b", "dies", "c", "hangs", "d"]
    results = list(run_table(names, tmp_path, time.monotonic() + 60, tiny=False))
    assert [result["cell"] for result in results] == names
    assert [result["outcome"] for result in results] == [
        MEASURED, FAILED, MEASURED, FAILED, MEASURED, CUT, MEASURED
    ]  # fmt: skip
    assert started == [names, names[2:], names[4:], names[6:]]
    assert results[3]["why"] == "its process ended with code 9"
    assert results[5]["why"] == "it was not done after 6 s"


def test_cells_behind_the_deadline_are_not_run(tmp_path: Path) -> None:
    results = list(run_table(["a", "b"], tmp_path, time.monotonic() - 1, tiny=False))
    assert [result["outcome"] for result in results] == [NOT_RUN, NOT_RUN]


def test_a_line_tells_speed_both_shares_and_what_it_is_beside() -> None:
    line = format_line(RESULT, FULL, PEAKS, 1e9, 131072.0)
    cells = dict(zip(HEADS, line.strip("| ").split(" | "), strict=True))
    assert cells["tokens/s"] == "262,144"  # 64 rows of 2,048 in half a second
    assert cells["ms a step"] == "500.0"
    assert cells["x as shipped"] == "2.00"
    assert cells["MFU, data sheet"] == "26.5%"
    assert cells["MFU, measured peak"] == "32.8%"
    assert (cells["save pause, s"], cells["data wait"], cells["last loss"]) == ("0.08", "0.1%", "10.500")
    failed = format_line({"cell": "x", "outcome": FAILED, "why": "a | b"}, FULL, PEAKS, 1e9, None)
    assert failed.startswith("| x | failed: a / b |")
    assert failed.count("|") == len(HEADS) + 1 == line.count("|")
    unknown = format_line(RESULT, FULL, PEAKS._replace(data_sheet_flops=None), 1e9, None)
    assert "26.5%" not in unknown
    assert "32.8%" in unknown


def test_every_cell_is_a_recipe_or_a_peer(tmp_path: Path) -> None:
    names = [cell.name for cell in CELLS]
    assert len(set(names)) == len(names)
    for cell in (*CELLS, *list_cells(tiny=True)):
        if cell.peer:
            assert cell.peer in PEERS
            assert not cell.words
        else:
            config = load_task_config(FULL, cell.words, tmp_path / "data", tmp_path / "runs")
            assert config.batch.sequence_length == 2048
            assert config.phases[0].num_steps == FULL.num_steps
            assert config.phases[1].num_steps == 5050, "what is chosen may depend on how long a plan is"


@pytest.mark.parametrize(
    ("error", "outcome", "why"),
    [
        (MemoryError("host"), FAILED, "MemoryError: host"),
        (torch.OutOfMemoryError("tried to allocate"), NO_MEMORY, "the device has not enough memory"),
        (UserError(Problem("no flash", "a CPU", "", "")), REFUSED, "no flash: a CPU"),
    ],
)
def test_what_goes_wrong_in_a_cell_is_its_line(
    error: Exception, outcome: str, why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(gpu_cells, "train_task", fail)
    assert run_cell(CELLS[0], TINY, tmp_path, tmp_path) == {"outcome": outcome, "why": why}


def test_choices_are_told_without_their_reasons() -> None:
    said = {
        "attention kernel": "sdpa, engine.attention is sdpa", "loss kernel": "liger, liger-kernel is installed",
        "torch.compile": "on, auto: it pays", "gradients": "fp32 accumulation and reduction, once per step, alone",
    }  # fmt: skip
    assert describe_choices(said) == "attention sdpa, loss liger, compile on, once per step"
