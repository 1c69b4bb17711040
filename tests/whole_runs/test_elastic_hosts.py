"""torchrun --nnodes 1:3 over hosts that lose their power and come back: the real agents, ranks forked from them."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from smoltrain.errors import DONE
from tests import launches, tiny
from tests.hosts import make_hosts, why_no_hosts
from tests.zygote import zygote

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.long,
    pytest.mark.skipif(why_no_hosts() is not None, reason=str(why_no_hosts())),
]
SHAPE = (
    "batch.accumulation=null", "batch.rows_per_step=8", "checkpoint.every=20", "checkpoint.keep_last=3",
    "evaluate.every=100000", "sample.every=100000", "track.print_every=20",
)  # fmt: skip
LOST_S = 9.0


def be_agent(words: list[str]) -> int:
    """torchrun's agent of one host; its ranks are forked, as everything is imported already."""
    import multiprocessing

    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # without it torch 2.13 loses a host that comes back
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined] # the zygote's word
    config = LaunchConfig(
        min_nodes=1, max_nodes=3, nproc_per_node=1, run_id="elastic", rdzv_backend="c10d", rdzv_endpoint="n0:29400",
        max_restarts=20, monitor_interval=0.5, start_method="fork", rdzv_configs={"last_call_timeout": 5},
    )  # fmt: skip
    elastic_launch(config, be_rank)(words)
    return 0


def be_rank(words: list[str]) -> None:
    from smoltrain.launch.rank import run_rank

    code = run_rank(["quickstart", *words])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def test_a_run_goes_on_with_the_hosts_that_are_left_and_takes_them_back_without_losing_a_row(tmp_path: Path) -> None:
    """3 hosts, of which 2 train, as 8 rows do not divide among 3; then 2, 3 again, and 1."""
    endless = tiny.words(tmp_path, *SHAPE, "phases.main.steps=100000", f"engine.lost_host_s={LOST_S}")
    logs: list[Path] = []

    def said() -> str:
        return "".join(log.read_text(encoding="utf-8", errors="replace") for log in logs)

    def train_on(count: int, what: str) -> None:
        """Wait until the run has begun `count` times and has published a checkpoint since."""
        launches.wait_until(lambda: said().count(what) >= count, 90)
        published = said().count("checkpoint step ")
        launches.wait_until(lambda: said().count("checkpoint step ") > published)

    with make_hosts(3, tmp_path) as hosts:

        def start(number: int) -> None:
            log = tmp_path / f"log {len(logs)}"
            log.touch()
            logs.append(log)
            lives.append(hosts.fork(log, be_agent, endless, on=(number,)))

        lives: list[Any] = []
        try:
            for number in range(3):
                start(number)
            launches.wait_until(lambda: "checkpoint step 20: " in said())
            assert said().count("among 3 ranks: 2 train, 1 is idle") == 1
            hosts.power_off(2)
            train_on(1, "on 2 ranks, ledger")
            hosts.power_on(2)
            start(2)
            train_on(2, "among 3 ranks: 2 train, 1 is idle")
            [stopped] = [line.split()[3] for line in said().splitlines() if line.startswith("stopped after step ")]
            assert f"restored step {stopped} on 2 ranks" in said(), "the host that came back cost no step"
            hosts.power_off(1)
            hosts.power_off(2)
            train_on(1, "on 1 ranks, ledger")
        finally:
            for life in lives:
                life.kill()
    assert f"has not been heard for {LOST_S:g} s" in said()
    run = tmp_path / "runs" / "quickstart"
    ledgers = {line["step"]: line["data/ledger"] for line in launches.metrics(run) if "data/ledger" in line}
    last = max(ledgers)

    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    words = tiny.words(undisturbed, *SHAPE, f"phases.main.steps={last}", "phases.continuation.steps=1")
    life = zygote().train(words, 1, undisturbed / "log")
    assert life.end() == [DONE], life.text()
    expected = launches.metrics(undisturbed / "runs" / "quickstart")
    assert ledgers == {
        line["step"]: line["data/ledger"] for line in expected if "data/ledger" in line and line["step"] <= last
    }
