"""deepspeed --hostfile over two hosts, by pdsh and ssh: its own launcher from start to end."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from smoltrain.errors import DONE
from tests import launches, tiny
from tests.hosts import Hosts, make_hosts, why_no_hosts

MISSING = [name for name in ("sshd", "pdsh") if not shutil.which(name)]
WHY_NOT = why_no_hosts() or (f"no {' and no '.join(MISSING)} here" if MISSING else None)
pytestmark = [pytest.mark.hosts, pytest.mark.long, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]
ENDLESS = ("phases.main.steps=100000", "evaluate.every=100000", "sample.every=100000")
LOST = "error: rank 1 on n1 is lost: the process has ended"


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with make_hosts(2, tmp_path) as two:
        two.start_sshd()
        yield two


def start(hosts: Hosts, folder: Path, *words: str) -> subprocess.Popen[str]:
    """DeepSpeed's runner on n0; what all ranks say goes to the end of folder/log."""
    hostfile = folder / "hostfile"
    hostfile.write_text("n0 slots=1\nn1 slots=1\n")
    programs = Path(sys.executable).parent
    runner = [str(programs / "deepspeed"), "--hostfile", str(hostfile), "--master_addr", "n0"]
    environment = launches.environment() | {"PATH": f"{programs}:{os.environ['PATH']}"}
    with (folder / "log").open("a") as log:
        return hosts.run(
            0, *runner, "launch/train.py", "quickstart", *tiny.words(folder, *words),
            stdout=log, stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip


def test_it_trains_and_ends_with_zero(hosts: Hosts, tmp_path: Path) -> None:
    runner = start(hosts, tmp_path)
    assert runner.wait(180) == DONE, (tmp_path / "log").read_text()
    assert "2 CPU ranks, " in (tmp_path / "log").read_text()
    assert max(launches.losses(tmp_path / "runs" / "quickstart")) == 12


def test_a_signal_saves_a_lost_rank_is_named_and_the_run_goes_on(hosts: Hosts, tmp_path: Path) -> None:
    def said() -> str:
        return (tmp_path / "log").read_text(encoding="utf-8", errors="replace")

    run = tmp_path / "runs" / "quickstart"
    runner = start(hosts, tmp_path, *ENDLESS)
    launches.wait_until(lambda: "checkpoint step 6: " in said())
    [python] = psutil.Process(runner.pid).children()
    python.send_signal(signal.SIGTERM)
    assert runner.wait(60) == 1, "the runner's own code"
    launches.wait_until(lambda: not ranks_alive(tmp_path))
    stopped = max(launches.losses(run))

    runner = start(hosts, tmp_path, *ENDLESS)
    launches.wait_until(lambda: f"restored step {stopped} on 2 ranks" in said(), 120)
    launches.wait_until(lambda: len(ranks_alive(tmp_path)) == 2)
    [second] = [rank for rank in ranks_alive(tmp_path) if rank.environ()["RANK"] == "1"]
    second.kill()
    assert runner.wait(60) != DONE
    assert LOST in said()
    launches.wait_until(lambda: not ranks_alive(tmp_path))


def ranks_alive(folder: Path) -> list[psutil.Process]:
    """The processes of launch/train.py that train in this folder."""
    ranks: list[psutil.Process] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if "launch/train.py" in words and str(folder) in " ".join(words) and "RANK" in process.environ():
                ranks.append(process)
    return ranks
