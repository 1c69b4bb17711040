"""launch/slurm.sbatch, and `srun` without torchrun, on two nodes of a real SLURM (tests/slurm.py), a gloo rank on each.

Nothing is preloaded or forked, as signals are to reach the very processes that SLURM starts: some minutes a test.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from smoltrain.checkpoint.manifest import find_newest_valid_checkpoint
from smoltrain.errors import BAD_INPUT, DONE
from tests import launches, tiny
from tests.slurm import GPUS, Slurm, make_slurm, why_no_slurm
from tests.zygote import zygote

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.long,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(why_no_slurm() is not None, reason=str(why_no_slurm())),
]
SCRIPT = launches.ROOT / "launch" / "slurm.sbatch"
PAGE = launches.ROOT / "docs" / "clusters.md"
ENDLESS = ("phases.main.steps=100000", "evaluate.every=100000", "sample.every=100000", "checkpoint.every=3")
SHORT = ("phases.main.steps=40", "evaluate.every=100000", "sample.every=100000", "checkpoint.every=0")
LOST_S = 6.0  # engine.lost_host_s
START_S = 300.0  # for two machines' programs to import torch twice, on two cores that others may use too
# What the scripts leave to the user.
ASKED = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", f"--gpus-per-node={GPUS}", "--time=60")
OWN = {"BIN": str(launches.BIN), "RANKS_PER_NODE": "1", "SMOLTRAIN_THREADS": "1"}
PROBE = """#!{python}
import os
from smoltrain.distributed.srun import adopt_srun_variables
adopt_srun_variables()
print(*(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")))
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with make_slurm(tmp_path_factory.mktemp("slurm")) as made:
        yield made


class Job:
    """A job of the short name quickstart, whose files are in `folder`."""

    def __init__(self, slurm: Slurm, folder: Path, script: Path, *overrides: str) -> None:
        self.slurm = slurm
        self.log = folder / "log"
        self.run_folder = folder / "runs" / "quickstart"
        self.log.touch()
        words = [str(script), "quickstart", *tiny.words(folder, *overrides)]
        self.number = slurm.submit(*ASKED, f"--output={self.log}", *words, **OWN)

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_for_line(self, line: str, seconds: float = START_S) -> None:
        try:
            launches.wait_until(lambda: line in self.text(), seconds)
        except AssertionError:
            raise AssertionError(f"no {line!r}: {self.slurm.show(self.number)}\n{self.text()[-3000:]}") from None

    def wait_for_step(self, step: int) -> None:
        launches.wait_until(lambda: max(launches.losses(self.run_folder), default=0) >= step, START_S)

    def newest_step(self) -> int:
        newest = find_newest_valid_checkpoint(self.run_folder / "checkpoints", print)
        assert newest is not None
        return newest.step

    def wait_for_end(self, state: str) -> None:
        self.slurm.wait_for(self.number, state)
        assert "Traceback" not in self.text()


def write_srun_script(folder: Path) -> Path:
    """The script that docs/clusters.md shows, with the programs of these tests and its user's recipe."""
    (shown,) = re.findall(r"^```text\n(#!/usr/bin/env bash\n.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    script = folder / "job.sbatch"
    script.write_text(shown.replace(".venv/bin", str(launches.BIN)).replace("smollm2-124m", '"$@"'))
    return script


def bits_of(folder: Path) -> tuple[dict[int, float], dict[str, str]]:
    """Losses and last weights of a short run."""
    run = folder / "runs" / "quickstart"
    return launches.losses(run), launches.weights_digest(run, 44)


def test_who_is_a_rank_of_srun(slurm: Slurm, tmp_path: Path) -> None:
    probe = tmp_path / "probe"
    probe.write_text(PROBE.format(python=launches.BIN / "python"))
    probe.chmod(0o755)
    layout = ("--nodes=2", "--ntasks-per-node=2")
    two_nodes = ["0 4 0 n0", "1 4 1 n0", "2 4 0 n0", "3 4 1 n0"]
    nobody = ["None None None None"]

    def said(*command: str) -> list[str]:
        text = slurm.ask(*command, PYTHONPATH=str(launches.ROOT))
        return sorted(line for line in text.splitlines() if re.fullmatch(r"[\dN]\S*( \S+){3}", line))

    assert said("srun", *layout, str(probe)) == two_nodes
    assert said("srun", "--nodes=1", "--ntasks=2", str(probe)) == ["0 2 0 127.0.0.1", "1 2 1 127.0.0.1"]
    assert said("srun", "--ntasks=1", str(probe)) == nobody
    assert said("salloc", *layout, "sh", "-c", str(probe)) == nobody, "SLURM_NTASKS and so on, but no step"
    shell = f"srun {' '.join(layout)} --pty sh -c '{probe} >{tmp_path}/shell.$SLURM_PROCID'"
    said("script", "-qec", shell, "/dev/null")  # srun makes a terminal only where it has one itself
    assert (tmp_path / "shell.0").read_text().splitlines() == nobody, "task 0 alone has the terminal"

    nested = f"[ $SLURM_PROCID != 0 ] || sbatch --wait --output={tmp_path}/nested --wrap {probe}"
    said("srun", *layout, "sh", "-c", nested)
    assert (tmp_path / "nested").read_text().splitlines() == nobody, "a batch script with the variables of that step"


def test_two_nodes_are_one_host_bit_for_bit_by_torchrun_and_by_srun_alone(slurm: Slurm, tmp_path: Path) -> None:
    """The job of srun is stopped on its way, by what `--signal=USR1@180` sends, and goes on."""
    one, by_torchrun, by_srun = (tmp_path / name for name in ("one", "torchrun", "srun"))
    for folder in (one, by_torchrun, by_srun):
        folder.mkdir()
    life = zygote().train(tiny.words(one, *SHORT), 2, one / "log")
    job = Job(slurm, by_srun, write_srun_script(by_srun), *SHORT)
    job.wait_for_step(5)
    slurm.ask("scancel", "--signal=USR1", job.number)
    job.wait_for_line("stopped after step ")
    other = Job(slurm, by_torchrun, SCRIPT, *SHORT)
    other.wait_for_end("COMPLETED")
    job.wait_for_end("COMPLETED")
    assert life.end() == [DONE, DONE]
    assert slurm.show(job.number)["Restarts"] == "1"
    [stopped] = re.findall(r"stopped after step (\d+) \(SIGUSR1\)", job.text())
    assert f"restored step {stopped} on 2 ranks" in job.text()
    assert f"WARNING: srun has started 1 task on n0, which has {GPUS} GPUs, and a task takes one" in job.text()
    assert "srun has started" not in other.text(), "torchrun starts the ranks"
    for folder in (by_torchrun, by_srun):
        assert bits_of(folder) == bits_of(one)


def test_a_job_goes_on_after_its_time_limit_and_preemption_until_it_is_cancelled(slurm: Slurm, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, SCRIPT, *ENDLESS)
    job.wait_for_line("checkpoint step 3: ")
    slurm.ask("scontrol", "update", f"JobId={job.number}", "TimeLimit=4")  # minutes; --signal asks for 180 s before it
    job.wait_for_line(f"asked to stop: job {job.number} goes back into the queue")
    slurm.ask("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
    [stopped] = re.findall(r"stopped after step (\d+) \(SIGUSR1\)", job.text())
    job.wait_for_line(f"restored step {stopped} on 2 ranks")

    job.wait_for_step(int(stopped) + 3)
    urgent = slurm.submit("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    slurm.wait_for(urgent, "COMPLETED")
    job.wait_for_line(f"restored step {(preempted := job.newest_step())} on 2 ranks")
    assert f"stopped after step {preempted} (SIGTERM)" in job.text(), "it has saved, and lost no step"
    assert slurm.show(job.number)["Restarts"] == "2"

    job.wait_for_step(preempted + 3)
    slurm.ask("scancel", job.number)
    job.wait_for_end("CANCELLED")
    losses = launches.losses(job.run_folder)
    assert job.newest_step() == max(losses)
    assert sorted(losses) == list(range(1, max(losses) + 1))


def test_a_mistake_is_said_on_both_nodes_and_not_queued_again(slurm: Slurm, tmp_path: Path) -> None:
    jobs: list[Job] = []
    for name, script in (("torchrun", SCRIPT), ("srun", write_srun_script(tmp_path))):
        (tmp_path / name).mkdir()
        jobs.append(Job(slurm, tmp_path / name, script, "model.hidden_size=33"))
    for job in jobs:
        job.wait_for_end("FAILED")
        assert job.text().count("the heads do not divide the width: saw 33") == 2
        assert slurm.show(job.number)["ExitCode"] == f"{BAD_INPUT}:0"
        assert slurm.show(job.number)["Restarts"] == "0"


def test_a_node_that_loses_its_power_gives_the_job_back_to_the_queue(slurm: Slurm, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, SCRIPT, *ENDLESS, f"engine.lost_host_s={LOST_S}")
    job.wait_for_line("checkpoint step 3: ")
    slurm.hosts.power_off(1)
    job.wait_for_line(f"error: n1 (rank 1) has not been heard for {LOST_S:g} s: its power or its network is gone")
    slurm.wait_for(job.number, "PENDING")
    last = job.newest_step()
    slurm.hosts.power_on(1)
    slurm.start_node(1)
    job.wait_for_line(f"restored step {last} on 2 ranks")
    slurm.ask("scancel", job.number)
    job.wait_for_end("CANCELLED")


def test_nothing_is_left_of_machines_and_daemons_after_a_failure(tmp_path: Path) -> None:
    left: list[Path] = []

    def fail() -> None:
        with make_slurm(tmp_path) as made:
            left.extend(Path(f"/proc/{process}") for process in (*made.hosts.keepers(), *made.processes()))
            assert all(process.exists() for process in left)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    launches.wait_until(lambda: not any(process.exists() for process in left))
