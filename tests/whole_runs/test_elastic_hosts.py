"""torchrun --nnodes 1:2 over hosts that lose their power and come back: the real agents, ranks forked from them."""

import os
import sys
from pathlib import Path

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
        min_nodes=1, max_nodes=2, nproc_per_node=1, run_id="elastic", rdzv_backend="c10d", rdzv_endpoint="n0:29400",
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


def test_a_run_goes_on_alone_and_takes_the_host_back_without_losing_a_row(tmp_path: Path) -> None:
    endless = tiny.words(tmp_path, *SHAPE, "phases.main.steps=100000", f"engine.lost_host_s={LOST_S}")
    logs = [tmp_path / name for name in ("n0", "n1", "n1 again")]
    for log in logs:
        log.touch()

    def said() -> str:
        return "".join(log.read_text(encoding="utf-8", errors="replace") for log in logs)

    with make_hosts(2, tmp_path) as hosts:
        lives = [hosts.fork(logs[number], be_agent, endless, on=(number,)) for number in range(2)]
        try:
            launches.wait_until(lambda: "checkpoint step 20: " in said())
            hosts.power_off(1)
            launches.wait_until(lambda: "on 1 ranks, ledger" in said(), 60)
            published = said().count("checkpoint step ")
            launches.wait_until(lambda: said().count("checkpoint step ") > published)
            hosts.power_on(1)
            lives.append(hosts.fork(logs[2], be_agent, endless, on=(1,)))
            launches.wait_until(lambda: "on 2 ranks, ledger" in said(), 60)
            published = said().count("checkpoint step ")
            launches.wait_until(lambda: said().count("checkpoint step ") > published)
        finally:
            for life in lives:
                life.kill()
    assert f"error: n1 (rank 1) has not been heard for {LOST_S:g} s" in said()
    [stopped] = [line.split()[3] for line in said().splitlines() if line.startswith("stopped after step ")]
    assert f"restored step {stopped} on 2 ranks" in said(), "the host that came back cost no step"
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
