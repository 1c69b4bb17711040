"""SIGKILL, SIGQUIT, SIGUSR1 and SIGHUP to any process of a run, however it was started: nobody stays, the rest follows.

What a signal leaves is trained to the end by the same words, and must then be bit for bit what nobody disturbed.
"""

import random
import signal
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from smoltrain.errors import DONE, STOPPED
from tests import launches, tiny
from tests.whole_runs.test_signals import SHAPE, STEPS, VICTIMS, assert_same, finished, victim_of

KILL, QUIT, USR1, HUP = signal.SIGKILL, signal.SIGQUIT, signal.SIGUSR1, signal.SIGHUP
FOUR_WAYS = VICTIMS | {"python": ("rank",)}
ASKS = (USR1, HUP)  # to stop: all is saved; the others end a process at once


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The run of nobody disturbed, by its number of ranks: sums over other numbers of ranks round otherwise."""
    whole = {}
    for size, launcher in ((1, "python"), (2, "smoltrain")):
        folder = tmp_path_factory.mktemp(f"straight-{size}")
        whole[size] = ended(folder, tiny.words(folder, *SHAPE), launcher)
    return whole


def ended(folder: Path, words: list[str], launcher: str) -> Path:
    """The run folder, when the run has been brought to its end by this launcher's number of ranks."""
    if launcher == "python":
        assert launches.run("python", words, folder / "log", timeout_s=600) == 0, (folder / "log").read_text()
        return folder / "runs" / "quickstart"
    return finished(folder, words)


def disturb(folder: Path, words: list[str], launcher: str, victim: str, number: signal.Signals, seed: int) -> int:
    """Start or go on, send the signal some steps later, and see that nobody stays; the exit code."""
    draw, run_folder = random.Random(seed), folder / "runs" / "quickstart"
    done = max(launches.losses(run_folder), default=0)
    process = launches.start(launcher, words, folder / "log")
    try:
        launches.wait_for_step(run_folder, done + draw.randint(1, 12), process)
        time.sleep(draw.random() * 0.2)
        at = psutil.Process(process.pid) if launcher == "python" else victim_of(victim, process, words, draw)
        at.send_signal(number)
        code = process.wait(60)
        launches.wait_until_gone(words, 60)
    finally:
        launches.kill_all(words)
    return code


def kill_many(folder: Path, launcher: str, kills: int, undisturbed: dict[int, Path]) -> Counter[str]:
    """So many lives that end by SIGKILL of some process, in one run; whom it met."""
    words, met = tiny.words(folder, *SHAPE), Counter[str]()
    for kill in range(kills):
        victim = FOUR_WAYS[launcher][kill % len(FOUR_WAYS[launcher])]
        assert disturb(folder, words, launcher, victim, KILL, seed=kill) != 0 or victim == "launcher"
        met[victim] += 1
    assert_same(finished(folder, words), undisturbed[2])
    return met


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_twelve_kills_under_a_launcher_lose_nothing(
    undisturbed: dict[int, Path], tmp_path: Path, launcher: str
) -> None:
    met = kill_many(tmp_path, launcher, 12, undisturbed)
    assert met.total() == 12
    print(launcher, met)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", [QUIT, USR1, HUP])
@pytest.mark.parametrize("launcher", FOUR_WAYS)
def test_a_signal_to_each_process_of_each_way_to_start_loses_nothing(
    undisturbed: dict[int, Path], tmp_path: Path, launcher: str, number: signal.Signals
) -> None:
    words = tiny.words(tmp_path, *SHAPE)
    for victim in FOUR_WAYS[launcher]:
        code = disturb(tmp_path, words, launcher, victim, number, seed=int(number))
        print(f"{launcher}: {number.name} to the {victim}: exit code {code}")
        if number in ASKS and victim in ("rank", "smoltrain"):
            assert code == (1 if launcher == "torchrun" else STOPPED)
            assert "the same command goes on from there" in (tmp_path / "log").read_text()
        elif victim in ("rank", "smoltrain"):
            assert code != DONE, "nobody was disturbed"
    whole = ended(tmp_path, words, launcher)
    assert_same(whole, undisturbed[1 if launcher == "python" else 2])
    assert max(launches.losses(whole)) == STEPS + 4
