"""`smoltrain check-hosts` on machines made out of namespaces: each fault is real, and its machine is named."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from smoltrain.errors import DONE, FAULT
from tests import launches, preloaded, tiny
from tests.hosts import make_hosts, why_no_hosts

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.slow,
    pytest.mark.skipif(why_no_hosts() is not None, reason=str(why_no_hosts())),
]


def check_with(words: list[str], faults: dict[str, Any]) -> int:
    """A rank of check-hosts; rank 1's machine has other packages and another time, where the faults say so."""
    from smoltrain import cli
    from smoltrain.checkpoint import written_files
    from smoltrain.doctor import hosts, links

    written_files.PATIENCE_S = 1.0
    hosts.LIMIT_S = faults.get("limit_s", hosts.LIMIT_S)
    if os.environ["RANK"] == "1":
        sys.path[:0] = faults.get("path", [])
        ahead_s = faults.get("ahead_s", 0.0)
        read_clock = links.read_clock
        links.read_clock = lambda: read_clock() + ahead_s
    try:
        cli.main(["check-hosts", "quickstart", *words])
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def findings(text: str) -> dict[str, dict[str, str]]:
    lines = [line for line in text.splitlines() if line.startswith(("{", "}", " ", "]"))]
    return {found["check"]: found for found in json.loads("\n".join(lines))["findings"]}


def test_the_odd_host_is_named_for_each_fault(tmp_path: Path) -> None:
    """n1 has a folder of its own at the path of the runs, an older torch, another time; n2 sends at 20 Mbit/s."""
    info = tmp_path / "older" / "torch-2.4.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.4.0\n")
    faults = {"path": [str(info.parent)], "ahead_s": 3600.0}
    with make_hosts(3, tmp_path) as hosts:
        hosts.hide_on(1, tmp_path / "runs")
        hosts.slow_down(2, "20mbit")
        life = hosts.fork(tmp_path / "log", check_with, [*tiny.words(tmp_path), "--json"], faults)
        assert life.end() == [FAULT] * 3, life.text()
    found = findings(life.text())
    assert found["hosts"]["saw"] == "3 ranks on 3 machines: n0 (1 rank), n1 (1 rank), n2 (1 rank)"
    assert found["versions"]["status"] == "fault"
    ours = metadata.version("torch")
    assert found["versions"]["saw"] == f"torch: n1 has 2.4.0 for CPUs; the other 2 have {ours} for CPUs"
    assert found["folder"]["saw"] == f"n1 does not see {tmp_path / 'runs'} of n0"
    assert found["clocks"]["status"] == "fault"
    assert found["clocks"]["saw"] == "n1 is 3,600.0 s ahead of most others"
    assert found["links"]["status"] == "warning"
    assert found["links"]["saw"].startswith("n2 is slower than the others: 0.0")
    assert found["all-reduce"]["status"] == "ok"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [], "no mark is left"


def test_hosts_that_are_alike_are_well(tmp_path: Path) -> None:
    with make_hosts(2, tmp_path) as hosts:
        life = hosts.fork(tmp_path / "log", check_with, tiny.words(tmp_path), {}, per_host=2)
        assert life.end() == [DONE] * 4, life.text()
    said = life.text()
    assert "ok       hosts            4 ranks on 2 machines: n0 (2 ranks), n1 (2 ranks)\n" in said
    assert f"ok       folder           all see {tmp_path / 'runs'}, and what n0 writes there\n" in said
    assert "ok       all-reduce       right sums over 4 ranks: 16.0 MiB at " in said
    assert not (tmp_path / "runs").exists(), "it was made for this alone"


def test_a_host_that_stands_still_ends_all_with_a_line(tmp_path: Path) -> None:
    with make_hosts(2, tmp_path) as hosts:
        life = hosts.fork(tmp_path / "log", stop_within_a_check, tiny.words(tmp_path))
        life.wait(lambda states: states[0] == FAULT)  # by itself; the other one is in a namespace that ends
        life.kill()
    assert "error: n0: versions has not ended within 2 s" in life.text()
    assert "Traceback" not in life.text()


def stop_within_a_check(words: list[str]) -> int:
    import signal

    from smoltrain.doctor import host_checks

    if os.environ["RANK"] == "1":
        host_checks.collect_versions = lambda: os.kill(os.getpid(), signal.SIGSTOP)
    return check_with(words, {"limit_s": 2.0})


def test_launchers_start_it_as_they_start_ranks(tmp_path: Path) -> None:
    """On one machine: the words of docs/clusters.md for torchrun, and for DeepSpeed's launcher."""
    words = ["check-hosts", "quickstart", *tiny.words(tmp_path)]
    port = str(launches.free_port())
    lines = {
        "torchrun": ["--nproc-per-node", "2", "--master-port", port, "-m", "smoltrain", *words],
        "deepspeed": ["--num_accelerators", "2", "--module", "--no_local_rank", "smoltrain", *words],
    }
    for launcher, line in lines.items():
        done = subprocess.run(
            [preloaded.programs() / launcher, *line], capture_output=True, text=True, timeout=200, check=False,
            cwd=tmp_path, env=launches.environment() | {"PYTHONPATH": str(launches.ROOT)},
        )  # fmt: skip
        assert done.returncode == DONE, done.stderr
        assert "warning  hosts            all 2 ranks are on one machine, " in done.stdout, launcher
        assert "ok       all-reduce       right sums over 2 ranks: 8.0 MiB at " in done.stdout
