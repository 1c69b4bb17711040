"""Signals at random moments, to any process of a run, under any launcher: all is saved, nobody stays, the rest follows.

A launcher's own exit code is the launcher's affair. What each says is in SAID, so that a change would be noticed;
`smoltrain train`, which starts its ranks itself, always says 75.
"""

import json
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from smoltrain.checkpoint.manifest import find_newest_valid_checkpoint
from smoltrain.errors import DONE, FAULT, STOPPED
from tests import launches, tiny
from tests.faulty_server import FaultyServer

TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
VICTIMS = {
    "smoltrain": ("rank", "smoltrain"),
    "deepspeed": ("rank", "launcher", "runner"),
    "torchrun": ("rank", "launcher"),
}
CELLS = [(launcher, victim) for launcher, victims in VICTIMS.items() for victim in victims]
SAID = {  # whom the signal meets: the exit code that is seen from outside, once the ranks have begun to train
    ("smoltrain", "rank"): dict.fromkeys((TERM, INT, USR1), STOPPED),
    ("smoltrain", "smoltrain"): dict.fromkeys((TERM, INT, USR1), STOPPED),
    ("deepspeed", "rank"): dict.fromkeys((TERM, INT, USR1), STOPPED),
    ("deepspeed", "launcher"): {TERM: 1, INT: 1, USR1: 0},  # not the truth: its runner hides that it was killed
    ("deepspeed", "runner"): {TERM: -TERM, INT: -INT, USR1: -USR1},
    ("torchrun", "rank"): dict.fromkeys((TERM, INT, USR1), 1),
    ("torchrun", "launcher"): {TERM: 1, INT: 1, USR1: -USR1},
}
STEPS = 160
SHAPE = (
    f"phases.main.steps={STEPS}", "evaluate.every=40", "sample.every=0", "track.gradients_every=0",
    "model.dropout=0.1", "checkpoint.every=10", "track.print_every=50",
)  # fmt: skip


def victim_of(victim: str, process: subprocess.Popen[Any], words: list[str], draw: random.Random) -> psutil.Process:
    """The process that the signal is for."""
    rank = draw.choice(launches.ranks_alive(words))
    if victim == "rank":
        return rank
    if victim == "smoltrain":
        return psutil.Process(process.pid)
    launcher = launches.launcher_of(rank)
    return launcher if victim == "launcher" else launches.launcher_of(launcher)


def disturbed_life(
    folder: Path, words: list[str], launcher: str, victim: str, number: signal.Signals, draw: random.Random
) -> None:
    """Start or go on, signal at some moment, and look at what is left. One in six comes before the first step."""
    run_folder, log = folder / "runs" / "quickstart", folder / "log"
    log.write_text("")
    done = max(launches.losses(run_folder), default=0)
    process = launches.start(launcher, words, log)
    try:
        early = draw.random() < 1 / 6
        if early:
            while len(launches.ranks_alive(words)) < 2:
                assert process.poll() is None, log.read_text()
                time.sleep(0.01)
        else:
            launches.wait_for_step(run_folder, done + draw.randint(1, 6), process)
        time.sleep(draw.random() * (6 if early else 0.3))
        began = time.monotonic()
        victim_of(victim, process, words, draw).send_signal(number)
        code = process.wait(40)
        launches.wait_until_gone(words, 40 - (time.monotonic() - began))
    finally:
        launches.kill_all(words)
    said = log.read_text()
    what = f"{launcher}, {number.name} to the {victim}: exit code {code}\n{said}"
    left = find_newest_valid_checkpoint(run_folder / "checkpoints", print)
    reached = max(launches.losses(run_folder), default=0)
    assert (left.step if left else 0) == reached, f"what was computed is saved; {what}"
    if reached > done:
        assert f"stopped after step {reached}" in said, what
        assert code == SAID[launcher, victim][number], what
    elif launcher == "smoltrain":
        assert code == STOPPED, what
    else:
        assert code in (-number, 128 + number, 256 - number, 0, 1), what


def finished(folder: Path, words: list[str]) -> Path:
    """The run folder, when the run has been brought to its end."""
    assert launches.run("smoltrain", words, folder / "log", timeout_s=600) == DONE, (folder / "log").read_text()
    return folder / "runs" / "quickstart"


def assert_same(run_folder: Path, other: Path) -> None:
    """Every step was made once, and none came out differently."""
    assert sorted(launches.losses(run_folder)) == list(range(1, STEPS + 5))
    assert launches.losses(run_folder) == launches.losses(other)
    assert launches.weights_digest(run_folder, STEPS + 4) == launches.weights_digest(other, STEPS + 4)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    return finished(folder, tiny.words(folder, *SHAPE))


SIX = (
    ("deepspeed", "runner", TERM), ("torchrun", "launcher", USR1), ("smoltrain", "rank", USR1),
    ("smoltrain", "smoltrain", INT), ("deepspeed", "launcher", TERM), ("torchrun", "rank", INT),
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_six_signals_leave_the_run_of_nobody_disturbed(undisturbed: Path, tmp_path: Path) -> None:
    draw, words = random.Random(5), tiny.words(tmp_path, *SHAPE)
    for launcher, victim, number in SIX:
        disturbed_life(tmp_path, words, launcher, victim, number, draw)
    assert_same(finished(tmp_path, words), undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_signal_leaves_what_muon_makes_of_it(tmp_path: Path) -> None:
    """Its own state is saved and goes on; who meets a signal, and how, does not depend on the optimizer."""
    words = {name: tiny.words(tmp_path / name, *SHAPE, "optimizer.kind=muon") for name in ("straight", "disturbed")}
    disturbed_life(tmp_path / "disturbed", words["disturbed"], "smoltrain", "rank", USR1, random.Random(5))
    runs = [finished(tmp_path / name, words[name]) for name in words]
    assert_same(*runs)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_evaluation_is_cut_short_and_made_up_for(tmp_path: Path) -> None:
    key = "validation/loss_nats_per_token"
    more = ("evaluate.every=10", "evaluate.rows=4000", "batch.micro_batch=1", "batch.accumulation=4")
    words = tiny.words(tmp_path, *SHAPE, *more, "checkpoint.every=0", "data.validation_share=0.4")
    run_folder = tmp_path / "runs" / "quickstart"
    for i in range(100):  # seconds of validation rows
        lines = [f"what news from {place}, my lord of {other}? {i}" for place in tiny.PLACES for other in tiny.PLACES]
        (tmp_path / "corpus" / f"more-{i}.txt").write_text("\n".join(lines))
    process = launches.start("torchrun", words, tmp_path / "log")
    try:
        launches.wait_for_step(run_folder, 10, process)  # which is told of before its evaluation begins
        launches.ranks_alive(words)[0].send_signal(TERM)
        process.wait(40)
        launches.wait_until_gone(words)
        assert "stopped after step 10 (SIGTERM)" in (tmp_path / "log").read_text()
        assert not [line for line in launches.metrics(run_folder) if key in line]
        left = find_newest_valid_checkpoint(run_folder / "checkpoints", print)
        assert left is not None
        assert (left.step, left.validation_loss) == (10, None)

        process = launches.start("torchrun", [*words, "evaluate.rows=8"], tmp_path / "log")
        launches.wait_for_step(run_folder, 11, process)
    finally:
        launches.kill_all(words)
        process.wait()
    assert [line["step"] for line in launches.metrics(run_folder) if key in line] == [10]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ranks_that_wait_for_data_heed_a_signal(tmp_path: Path) -> None:
    texts = "".join(path.read_text() for path in sorted(tiny.text(tmp_path).iterdir()))
    records = [f'{{"text": {json.dumps(line)}}}\n' for line in texts.splitlines()]
    with FaultyServer({"plays.jsonl": "".join(records).encode()}) as server:
        path = server.url("plays.jsonl")
        data = f"data={{path: '{path}', validation_share: 0.1, mode: stream, shuffle_rows: 4, patience_s: 600}}"
        shared = [word for word in tiny.words(tmp_path, *SHAPE) if not word.startswith("data.")]
        words, run_folder = [data, *shared, "phases.main.steps=5000"], tmp_path / "runs" / "quickstart"
        process = launches.start("torchrun", words, tmp_path / "log")
        try:
            launches.wait_for_step(run_folder, 3, process)
            server.faults["unavailable"] = 1.0
            deadline = time.monotonic() + 120
            while "waits for data" not in (tmp_path / "log").read_text():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            launches.ranks_alive(words)[1].send_signal(USR1)
            process.wait(40)
            launches.wait_until_gone(words)
        finally:
            launches.kill_all(words)
    assert ", waiting for data; the same command goes on from there" in (tmp_path / "log").read_text()
    left = find_newest_valid_checkpoint(run_folder / "checkpoints", print)
    assert left is not None
    assert left.step == max(launches.losses(run_folder))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_rank_that_is_stopped_in_mid_run_ends_it_within_the_limit(tmp_path: Path) -> None:
    words, run_folder = tiny.words(tmp_path, *SHAPE, "engine.hang_s=25"), tmp_path / "runs" / "quickstart"
    process = launches.start("torchrun", words, tmp_path / "log")
    try:
        launches.wait_for_step(run_folder, 3, process)
        ranks = {rank.environ()["RANK"]: rank for rank in launches.ranks_alive(words)}
        ranks["1"].suspend()
        assert process.wait(180) == FAULT
        launches.wait_until_gone(words)
    finally:
        launches.kill_all(words)
    said = (tmp_path / "log").read_text()
    assert said.count("error: no sign of life for 2") == 1
    assert "rank 1 wrote nothing: it is stopped or dead; the stacks are in" in said
    assert "in all_reduce" in (run_folder / "logs" / "hang-rank0.txt").read_text()
    assert not (run_folder / "logs" / "hang-rank1.txt").exists()


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", [TERM, INT, USR1])
def test_sixty_signals_leave_the_run_of_nobody_disturbed(
    undisturbed: Path, tmp_path: Path, number: signal.Signals
) -> None:
    draw, words = random.Random(number), tiny.words(tmp_path, *SHAPE)
    cells = CELLS * 2 + draw.sample(CELLS, 6)  # 20 for each signal
    draw.shuffle(cells)
    for launcher, victim in cells:
        disturbed_life(tmp_path, words, launcher, victim, number, draw)
    assert_same(finished(tmp_path, words), undisturbed)
