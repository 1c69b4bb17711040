"""launch/slurm.sbatch and launch/torchrun.py for real, on two CPU ranks: only srun and scontrol are stand-ins.

What SLURM itself does, and several nodes, are tried in test_real_slurm.py.
"""

import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from smoltrain.checkpoint.manifest import find_newest_valid_checkpoint
from smoltrain.config.schema import EngineSection
from smoltrain.distributed.world import free_port
from smoltrain.errors import BAD_INPUT, DONE, STOPPED
from tests import launches, tiny

BATCH = launches.ROOT / "launch" / "slurm.sbatch"
# As the real ones: srun drops its options, runs the task, and gives it the signals that it gets itself.
STAND_INS = {
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" >>"$REQUEUED"; fi',
}


def start(folder: Path, words: list[str]) -> subprocess.Popen[Any]:
    """The batch script as SLURM would start it: one node of two ranks."""
    stand_ins = folder / "bin"
    stand_ins.mkdir(exist_ok=True)
    for name, text in STAND_INS.items():
        (stand_ins / name).write_text(f"#!/bin/sh\n{text}\n")
        (stand_ins / name).chmod(0o755)
    own = {
        "PATH": f"{stand_ins}:{os.environ['PATH']}", "BIN": str(launches.BIN), "RANKS_PER_NODE": "2",
        "PORT": str(free_port()), "REQUEUED": str(folder / "requeued"), "SLURM_JOB_ID": "4711", "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "localhost", "SLURM_SUBMIT_DIR": str(launches.ROOT),
    }  # fmt: skip
    with (folder / "log").open("ab") as out:
        return subprocess.Popen(
            ["bash", str(BATCH), "quickstart", *words], stdout=out, stderr=subprocess.STDOUT,
            env=launches.environment() | own, cwd=folder, start_new_session=True,
        )  # fmt: skip


def requeued(folder: Path) -> str:
    path = folder / "requeued"
    return path.read_text() if path.exists() else ""


@pytest.mark.slow
def test_before_its_time_is_up_a_job_saves_and_queues_itself_again(tmp_path: Path) -> None:
    words, run_folder = tiny.words(tmp_path, "phases.main.steps=60", "checkpoint.every=0"), tmp_path / "runs/quickstart"
    job = start(tmp_path, words)
    try:
        launches.wait_for_step(run_folder, 5, job)
        job.send_signal(signal.SIGUSR1)  # to the batch shell alone, as --signal=B:USR1 does
        assert job.wait(60) == STOPPED, (tmp_path / "log").read_text()
        launches.wait_until_gone(words)
        assert requeued(tmp_path) == "requeue 4711\n"
        said = (tmp_path / "log").read_text()
        assert "torchrun: its ranks were asked to stop by SIGUSR1" in said
        assert "Traceback" not in said
        left = find_newest_valid_checkpoint(run_folder / "checkpoints", print)
        assert left is not None
        assert left.step == max(launches.losses(run_folder)), "nothing that was computed is lost"

        assert start(tmp_path, words).wait(launches.TIMEOUT_S) == DONE, (tmp_path / "log").read_text()
        assert f"restored step {left.step} on 2 ranks" in (tmp_path / "log").read_text()
        assert requeued(tmp_path) == "requeue 4711\n", "a finished plan is not"
    finally:
        launches.kill_all(words)
    assert sorted(launches.losses(run_folder)) == list(range(1, 65))
    assert list(launches.ROOT.glob("*4711*")) == [], "the script leaves no file"


@pytest.mark.slow
def test_a_rank_that_is_asked_to_stop_by_somebody_else_queues_the_job_too(tmp_path: Path) -> None:
    words, run_folder = tiny.words(tmp_path, "phases.main.steps=60", "checkpoint.every=0"), tmp_path / "runs/quickstart"
    job = start(tmp_path, words)
    try:
        launches.wait_for_step(run_folder, 2, job)
        ranks = [process for process in launches.alive(words).values() if "launch/train.py" in process.cmdline()[:3]]
        ranks[0].send_signal(signal.SIGTERM)
        assert job.wait(60) == STOPPED, (tmp_path / "log").read_text()
    finally:
        launches.kill_all(words)
    assert requeued(tmp_path) == "requeue 4711\n"
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_mistake_is_not_tried_again(tmp_path: Path) -> None:
    words = tiny.words(tmp_path, "model.hidden_size=33")
    assert start(tmp_path, words).wait(launches.TIMEOUT_S) == BAD_INPUT, "of which torchrun alone would make 1"
    assert "the heads do not divide the width: saw 33" in (tmp_path / "log").read_text()
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert requeued(tmp_path) == ""


def test_what_is_asked_of_slurm() -> None:
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", BATCH.read_text(), re.MULTILINE))
    assert asked["ntasks-per-node"] == "1", "torchrun starts the ranks of a node"
    assert "requeue" in asked
    ahead = re.fullmatch(r"B:USR1@(\d+)", asked["signal"])
    save = re.search(r"^SAVE_S=(\d+)", BATCH.read_text(), re.MULTILINE)
    assert ahead
    assert save
    assert int(ahead[1]) > int(save[1]) > EngineSection().lost_host_s, "a host may be lost after the signal"
