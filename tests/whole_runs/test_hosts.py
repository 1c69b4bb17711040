"""Runs over several machines, made out of namespaces: what is lost, hidden or misnamed ends in one line, or in nothing.

Ranks are forked from a process that has imported everything (tests/zygote.py), into hosts (tests/hosts.py).
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from smoltrain.checkpoint.manifest import Manifest, verify_checkpoint
from smoltrain.errors import BAD_INPUT, DONE, FAULT
from tests import launches, tiny
from tests.hosts import Hosts, make_hosts, why_no_hosts
from tests.zygote import Life

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.slow,
    pytest.mark.skipif(why_no_hosts() is not None, reason=str(why_no_hosts())),
]
ENDLESS = ("phases.main.steps=100000", "evaluate.every=100000", "sample.every=100000", "checkpoint.every=3")
LOST_S = 6.0  # engine.lost_host_s here
SHORT = ("phases.main.steps=3", "phases.continuation.steps=1", "sample.every=100")


def train_impatiently(words: list[str]) -> int:
    """A rank that does not wait long for a network file system."""
    from smoltrain.checkpoint import written_files
    from smoltrain.launch.rank import run_rank

    written_files.PATIENCE_S = 1.0
    return run_rank(["quickstart", *words])


def errors(life: Life) -> list[str]:
    """The lines of errors that the ranks have printed, each once."""
    said = life.text()
    assert "Traceback" not in said, said
    return [line for line in said.splitlines() if line.startswith("error: ")]


@contextlib.contextmanager
def training(hosts: Hosts, folder: Path, *overrides: str) -> Iterator[Life]:
    """A run that has published a checkpoint and goes on for ever."""
    life = hosts.train(tiny.words(folder, *ENDLESS, *overrides), folder / "log", per_host=2)
    try:
        launches.wait_until(lambda: "checkpoint step 3: " in life.text())
        yield life
    finally:
        life.kill()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, float], dict[str, str]]:
    """Losses and weights of the short run on two hosts with names, which a run by collectives of one host has too."""
    folder = tmp_path_factory.mktemp("reference")
    with make_hosts(2, folder) as hosts:
        life = hosts.train(tiny.words(folder, *SHORT), folder / "log")
        assert life.end() == [DONE, DONE], life.text()
    run = folder / "runs" / "quickstart"
    return launches.losses(run), launches.weights_digest(run, 4)


@pytest.mark.parametrize("names", ["loopback", "none"])
def test_a_host_whose_name_leads_to_itself_takes_the_way_to_the_others(
    names: str, tmp_path: Path, reference: tuple[dict[int, float], dict[str, str]]
) -> None:
    with make_hosts(2, tmp_path, names=names) as hosts:  # pyright: ignore[reportArgumentType]
        life = hosts.train(tiny.words(tmp_path, *SHORT), tmp_path / "log")
        assert life.end() == [DONE, DONE], life.text()
    leads_to = {"loopback": "127.0.1.1", "none": "nothing"}[names]
    for number in range(2):
        said = (
            f"n{number}: its own name leads to {leads_to}, where no other machine reaches it; gloo and NCCL take eth0"
        )
        assert said in life.text()
    run = tmp_path / "runs" / "quickstart"
    assert (launches.losses(run), launches.weights_digest(run, 4)) == reference


@pytest.mark.parametrize("without", [(), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")], ids=["launcher", "PyTorchJob"])
def test_machines_of_one_name_are_two_and_share_no_memory(
    without: tuple[str, ...], tmp_path: Path, reference: tuple[dict[int, float], dict[str, str]]
) -> None:
    with make_hosts(2, tmp_path, same_name=True) as hosts:
        life = hosts.train(tiny.words(tmp_path, *SHORT), tmp_path / "log", without=without)
        assert life.end() == [DONE, DONE], life.text()
    assert "once per step, by collectives" in life.text()
    run = tmp_path / "runs" / "quickstart"
    assert (launches.losses(run), launches.weights_digest(run, 4)) == reference


def test_without_an_interface_to_the_others_every_host_says_so(tmp_path: Path) -> None:
    with make_hosts(2, tmp_path) as hosts:
        environment = {"GLOO_SOCKET_IFNAME": "ib7"}
        life = hosts.train(tiny.words(tmp_path, *SHORT), tmp_path / "log", environment=environment)
        assert life.end() == [BAD_INPUT, BAD_INPUT]
    assert "error: n0 has no such network interface: saw 'ib7', want one of eth0, lo; change the env" in life.text()
    assert "error: n1 has no such network interface: saw 'ib7', want one of eth0, lo; change the env" in life.text()
    assert "Traceback" not in life.text()


def test_a_folder_that_is_not_shared_ends_every_rank_with_a_line_on_every_host(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with make_hosts(2, tmp_path) as hosts:
        hosts.hide(runs)
        life = hosts.fork(tmp_path / "log", train_impatiently, tiny.words(tmp_path, *SHORT), per_host=2)
        assert life.end() == [BAD_INPUT] * 4
    line = f"the machines do not share the run's folder: saw n1 does not see {runs}, want a folder that all machines"
    said = errors(life)
    assert [known.split(line)[0] for known in said] == ["error: ", "error: rank 0 on n0: "]
    assert not (runs / "quickstart").exists()
    own = tmp_path / f"private.0{runs}"
    assert [path.name for path in own.iterdir()] == [".quickstart.lock"], "the mark is gone, and nothing was begun"


def test_machines_with_folders_of_their_own_train_save_and_resume(
    tmp_path: Path, reference: tuple[dict[int, float], dict[str, str]]
) -> None:
    runs = tmp_path / "runs"
    words = tiny.words(tmp_path, *SHORT, "checkpoint.shared=off")
    for stop in (["run.stop_after=main"], []):
        with make_hosts(2, tmp_path) as hosts:
            hosts.hide(runs)
            life = hosts.train([*words, *stop], tmp_path / "log")
            assert life.end() == [DONE, DONE], life.text()
    first = tmp_path / f"private.0{runs}/quickstart"
    assert (launches.losses(first), launches.weights_digest(first, 4)) == reference
    assert [path.name for path in sorted((first / "checkpoints").iterdir())] == ["step-00000003", "step-00000004"]
    for step in (3, 4):
        assert isinstance(verify_checkpoint(first / f"checkpoints/step-0000000{step}"), Manifest)
    other = tmp_path / f"private.1{runs}/quickstart"
    assert "restored step 3 on 2 ranks" in life.text()
    assert [path.name for path in (other / "checkpoints").iterdir()] == ["step-00000003"], "what it was sent to restore"


def test_a_folder_that_is_lost_while_training_publishes_no_checkpoint(tmp_path: Path) -> None:
    words = tiny.words(tmp_path, *ENDLESS, "checkpoint.every=50", "checkpoint.keep_last=9")
    with make_hosts(2, tmp_path) as hosts:
        life = hosts.fork(tmp_path / "log", train_impatiently, words)
        try:
            launches.wait_until(lambda: "step      2/" in life.text())
            hosts.hide_on(1, tmp_path / "runs")
            (tmp_path / f"private.1{tmp_path}/runs/quickstart/checkpoints/step-00000050.tmp").mkdir(parents=True)
            assert life.end() == [FAULT, FAULT]
        finally:
            life.kill()
    [said] = {line.removeprefix("error: rank 0 on n0: ").removeprefix("error: ") for line in errors(life)}
    assert said.startswith("the checkpoint of step 50 could not be written (rank 1: it has written on n1 what n0 does ")
    assert "there is no checkpoint before it" in said
    assert "published" not in life.text()
    assert [path.name for path in (tmp_path / "runs/quickstart/checkpoints").iterdir()] == ["step-00000050.tmp"]


def test_a_mistake_of_one_host_reaches_the_console_with_its_name(tmp_path: Path) -> None:
    with make_hosts(2, tmp_path) as hosts:
        life = hosts.fork(tmp_path / "log", train_without_its_text, tiny.words(tmp_path, *SHORT), per_host=2)
        assert life.end() == [BAD_INPUT] * 4
    said = errors(life)
    assert sorted(line.partition("this rank")[0] for line in said) == ["error: rank 3 on n1: "] * 2
    assert len(said) == 2, "one line a host"


def train_without_its_text(words: list[str]) -> int:
    """The last rank finds a mistake that no other has."""
    import os

    from smoltrain.errors import Problem, UserError
    from smoltrain.launch.rank import run_rank
    from smoltrain.training import open_session

    def refuse(*_: object, **__: object) -> None:
        raise UserError(Problem("this rank has no text", "nothing", "its part", "data.path"))

    if os.environ["RANK"] == "3":
        open_session.open_loader = refuse
    return run_rank(["quickstart", *words])


def test_a_process_that_dies_is_named_with_its_host_and_ends_all(tmp_path: Path) -> None:
    with make_hosts(2, tmp_path) as hosts, training(hosts, tmp_path) as life:
        life.kill(3)
        assert life.end(20)[:3] == [FAULT] * 3
    assert [line.partition(";")[0] for line in errors(life)] == [
        "error: rank 3 on n1 is lost: the process has ended"
    ] * 2, "one line a host"


@pytest.mark.parametrize("number", [1, 0], ids=["another host", "the host of rank 0"])
def test_a_power_cut_ends_the_ranks_of_all_other_hosts(number: int, tmp_path: Path) -> None:
    with make_hosts(2, tmp_path) as hosts, training(hosts, tmp_path, f"engine.lost_host_s={LOST_S}") as life:
        hosts.power_off(number)
        states = life.end()
    lost = slice(2 * number, 2 * number + 2)
    assert states[2 - 2 * number : 4 - 2 * number] == [FAULT] * 2
    ranks = "ranks " + ", ".join(map(str, range(4)[lost]))
    assert [line.partition(";")[0] for line in errors(life)] == [
        f"error: n{number} ({ranks}) has not been heard for {LOST_S:g} s: its power or its network is gone"
    ]


def test_who_is_only_slow_or_stopped_is_not_lost(tmp_path: Path) -> None:
    with make_hosts(2, tmp_path) as hosts, training(hosts, tmp_path, "engine.lost_host_s=3") as life:
        hosts.stop_ranks(1)
        time.sleep(3 * 3)
        assert life.states() == ["runs"] * 4, "a kernel answers for processes that do not run"
        hosts.resume_ranks(1)
        before = life.text().count("\n")
        launches.wait_until(lambda: life.text().count("\n") > before)
        assert not errors(life)


def test_nothing_of_the_hosts_is_left(tmp_path: Path) -> None:
    with make_hosts(2, tmp_path) as hosts:
        keepers = [Path(f"/proc/{pid}") for pid in hosts.keepers()]
        assert all(keeper.exists() for keeper in keepers)
    launches.wait_until(lambda: not any(keeper.exists() for keeper in keepers))
