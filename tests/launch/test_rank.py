"""launch/train.py under each launcher: the same losses, the same mistakes, the true exit code."""

import errno
import platform
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from smoltrain.errors import BAD_INPUT, DONE, FAULT, STOPPED, UserError
from smoltrain.launch import rank
from smoltrain.launch.rank import read_words
from tests import launches, tiny

# python: 1 rank that splits 8 rows for itself; the others: 2 ranks x 2 x 2. A constant continuation may be prolonged.
SAME_ROWS = ("batch.accumulation=null", "batch.rows_per_step=8", "phases.continuation.schedule=constant")
LAUNCHERS = ("python", "torchrun", "deepspeed")
OWN = {"python": ("batch.micro_batch=auto",)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run folders of the same tiny run under each launcher."""
    folders = {}
    for launcher in LAUNCHERS:
        folder = tmp_path_factory.mktemp(launcher)
        words = tiny.words(folder, *SAME_ROWS, *OWN.get(launcher, ()))
        assert launches.run(launcher, words, folder / "log") == DONE, (folder / "log").read_text()
        folders[launcher] = folder / "runs" / "quickstart"
    return folders


@pytest.mark.slow
def test_all_launchers_train_the_same_run(finished: dict[str, Path]) -> None:
    reference = launches.losses(finished["deepspeed"])
    assert sorted(reference) == list(range(1, 13))
    assert launches.losses(finished["torchrun"]) == reference, "two ranks are two ranks"
    for step, loss in launches.losses(finished["python"]).items():
        assert loss == pytest.approx(reference[step], rel=1e-4)
    ledgers = {
        launcher: [line["data/ledger"] for line in launches.metrics(folder) if "data/ledger" in line]
        for launcher, folder in finished.items()
    }
    assert ledgers["python"] == ledgers["torchrun"] == ledgers["deepspeed"], "the data do not depend on the world size"


@pytest.mark.slow
def test_rows_are_split_by_the_machine_where_the_recipe_leaves_it_to_that(finished: dict[str, Path]) -> None:
    said = (finished["python"].parent.parent / "log").read_text()
    assert "8 rows, auto: " in said
    assert "8 = 8 x 1 accumulated x 1 ranks" in said
    assert "micro_batch: auto\n" in (finished["python"] / "config.yaml").read_text(), "another start may split anew"


@pytest.mark.slow
def test_a_finished_plan_says_so_and_exits_0(finished: dict[str, Path]) -> None:
    folder = finished["python"].parent.parent
    assert launches.run("python", tiny.words(folder, *SAME_ROWS), folder / "again") == DONE
    assert "the plan is complete (12 steps)" in (folder / "again").read_text()
    assert "\ndone: 12 of 12 steps\n" in (folder / "log").read_text()
    assert "done: " not in (folder / "again").read_text()


@pytest.mark.slow
def test_a_finished_plan_is_complete_on_any_number_of_ranks(finished: dict[str, Path]) -> None:
    folder = finished["deepspeed"].parent.parent
    assert launches.run("python", tiny.words(folder, *SAME_ROWS), folder / "alone") == DONE
    assert "the plan is complete (12 steps)" in (folder / "alone").read_text()


@pytest.mark.parametrize(
    ("words", "name", "seed"),
    [
        ("quickstart --seed 7 --run.name=first", "first", 7),
        ("--seed 7", "quickstart", 7),
        ("--seed=7 smollm2-135m", "smollm2-135m", 7),
        ("seed=7 --run-name-is=x", None, None),
    ],
)
def test_a_ranks_words_may_be_options(words: str, name: str | None, seed: int | None) -> None:
    if name is None:
        with pytest.raises(UserError, match="unknown key run_name_is"):
            read_words(words.split())
        return
    config, start = read_words(words.split())
    assert (config.run.name, config.run.seed, start) == (name, seed, None)


@pytest.mark.slow
def test_another_number_of_ranks_takes_over(finished: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(finished["deepspeed"].parent, tmp_path / "runs")
    words = tiny.words(tmp_path, *SAME_ROWS, "phases.continuation.steps=5")
    assert launches.run("python", words, tmp_path / "log") == DONE
    said = (tmp_path / "log").read_text()
    assert "restored step 12 on 1 ranks" in said
    assert "the plan is complete (13 steps)" in said


@pytest.mark.parametrize(("launcher", "code"), [("python", BAD_INPUT), ("deepspeed", BAD_INPUT), ("torchrun", 1)])
def test_a_mistake_is_printed_once_without_a_traceback(tmp_path: Path, launcher: str, code: int) -> None:
    words = tiny.words(tmp_path, "model.hidden_size=33", "batch.sequence_length=65")
    assert launches.run(launcher, words, tmp_path / "log") == code  # torchrun turns every failure into 1
    said = (tmp_path / "log").read_text()
    assert said.count("the heads do not divide the width: saw 33") == 1
    assert said.count("the sequence is longer than the positions: saw 65") == 1
    if launcher != "torchrun":  # whose own report has one
        assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "code"), [("smoltrain", BAD_INPUT), ("deepspeed", BAD_INPUT), ("torchrun", FAULT)]
)
def test_a_mistake_of_one_rank_alone_is_printed_with_its_host_and_hangs_nobody(
    tmp_path: Path, launcher: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python runs sitecustomize.py at its start: rank 1 alone finds a variable that makes no sense."""
    only_there = 'import os\nif os.environ.get("RANK") == "1":\n    os.environ["SMOLTRAIN_THREADS"] = "none"\n'
    (tmp_path / "sitecustomize.py").write_text(only_there)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    words = tiny.words(tmp_path)
    found = launches.run(launcher, words, tmp_path / "log", preloads=False)
    assert found == code, "torchrun turns every failure into 1"
    said = (tmp_path / "log").read_text()
    host = socket.gethostname()
    lines = [line for line in said.splitlines() if "no number of threads: saw 'none'" in line]
    assert [line.partition("no number")[0] for line in lines] == [f"error: rank 1 on {host}: "], said
    if launcher != "torchrun":  # whose own report has one
        assert "Traceback" not in said


def test_a_loss_that_is_no_number_stops_before_the_update(tmp_path: Path) -> None:
    words = tiny.words(tmp_path, "phases.main.lr=1e10", "phases.main.warmup_steps=0", "checkpoint.every=1")
    assert launches.run("python", words, tmp_path / "log") == FAULT
    said = (tmp_path / "log").read_text()
    assert "error: the loss of step 2 is nan on rank 0 (lr " in said
    assert "try a lower lr" in said
    assert "Traceback" not in said
    assert [p.name for p in (tmp_path / "runs" / "quickstart" / "checkpoints").iterdir()] == ["step-00000001"]


def test_one_signal_to_a_bare_python_saves_and_exits_75(tmp_path: Path) -> None:
    words = tiny.words(tmp_path, "phases.main.steps=5000")
    process = launches.start("python", words, tmp_path / "log")
    launches.wait_for_step(tmp_path / "runs" / "quickstart", 5, process)
    launches.interrupt(process, signal.SIGUSR1)
    assert process.wait(40) == STOPPED
    assert "SIGUSR1" in (tmp_path / "log").read_text()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept_and_not_zeroed_again() -> None:
    code = """
import resource, torch
from smoltrain.launch.rank import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(2**24) * 2
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
given_back = faults(); keep_freed_memory(); faults(); faults(); print(given_back, faults())
"""
    words = [sys.executable, "-c", code]
    before, after = map(int, subprocess.run(words, capture_output=True, text=True, check=True).stdout.split())
    assert before > 5 * 2 * 2**24 * 4 // (2 << 20), "two tensors of 64 MiB each time, in pages"
    assert after < before / 2, "the heap may still grow once"


def lose_the_disk(error: BaseException) -> None:
    """As a library does that says nothing of it itself."""
    raise RuntimeError("the compiler failed") from error


@pytest.mark.parametrize("wraps", [False, True])
def test_a_disk_that_is_full_is_no_traceback_of_a_rank(
    wraps: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "kernel.cpp")

    def read(_words: list[str]) -> None:
        if wraps:
            lose_the_disk(full)
        raise full

    monkeypatch.setattr(rank, "read_words", read)
    monkeypatch.setattr(rank, "choose_waiting", dict)
    assert rank.run_rank([]) == BAD_INPUT
    line = "error: a file cannot be written: saw No space left on device, want some free space; change kernel.cpp\n"
    assert capsys.readouterr() == ("", line)
