"""Runs inside a program: one after the other in one process, the same bits, and the process is given back."""

import gc
import hashlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from smoltrain.config.schema import Config
from smoltrain.distributed.world import is_world_open
from smoltrain.errors import DONE, UserError
from smoltrain.launch import in_process
from smoltrain.launch.in_process import train_in_process
from smoltrain.launch.supervisor import supervise_config
from smoltrain.training import loop
from tests import tiny

FEW = (
    "phases.main.steps=2", "phases.main.warmup_steps=1", "phases.continuation.steps=1", "evaluate.every=0",
    "sample.every=0", "checkpoint.every=0", "engine.gradient_checkpointing=none",
)  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Config]:
    return lambda name, *overrides: tiny.load(tmp_path, *FEW, f"run.name={name}", *overrides)


@pytest.fixture(autouse=True)
def unchanged(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No run leaves a trace in its process. Curves, which take longer than three steps, are not drawn."""
    monkeypatch.setattr(loop, "draw_run", lambda *_: None)

    def observe() -> list[Any]:
        handlers = [signal.getsignal(number) for number in in_process_signals]
        threads = {thread for thread in threading.enumerate() if thread.name in ("watchdog", "launcher")}
        files = {os.path.realpath(descriptor) for descriptor in Path("/proc/self/fd").iterdir()}
        locks = {name for name in files if name.endswith(".lock")}
        environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
        return [handlers, environment, torch.get_num_threads(), sys.excepthook, gc.isenabled(), threads, locks]

    in_process_signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGTSTP)
    before = observe()
    yield
    assert observe() == before
    assert not is_world_open()


def weights(config: Config) -> str:
    """A hash of the last step's."""
    [path] = config.run_folder.glob("checkpoints/step-00000003/model.safetensors")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def after_step(last: int, act: Callable[[], Any]) -> Callable[..., None]:
    """A callback that does something when this step is done."""

    def callback(step: int, metrics: dict[str, Any]) -> None:
        if step == last:
            act()

    return callback


def test_many_runs_in_one_process_and_whatever_ends_them_give_the_same_bits(
    config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_in_process(config("straight")) is None

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(in_process, "begin_run", interrupt)
        with pytest.raises(KeyboardInterrupt):  # before there is anything to lose
            train_in_process(config("broken"))

    def fail() -> None:
        raise OSError("of the program")

    with pytest.raises(OSError, match="of the program"):  # as it was raised, and no fault of the run's files
        train_in_process(config("broken"), [after_step(1, fail)])
    assert [path.name for path in config("broken").run_folder.glob("checkpoints/step-*")] == ["step-00000001"]
    reason = train_in_process(config("broken"), [after_step(2, lambda: signal.raise_signal(signal.SIGINT))])
    assert reason == "SIGINT"
    assert "stopped after step 2 (SIGINT)" in capsys.readouterr().out
    assert train_in_process(config("broken")) is None
    assert weights(config("broken")) == weights(config("straight"))
    assert train_in_process(config("broken")) is None, "there is nothing left to do"


@pytest.mark.slow
def test_a_signal_that_would_end_the_program_does_so_when_the_run_is_saved(config: Callable[..., Config]) -> None:
    received: list[list[str]] = []

    def receive(number: int, _frame: Any) -> None:
        received.append([path.name for path in config("term").run_folder.glob("checkpoints/step-*")])

    before = signal.signal(signal.SIGTERM, receive)
    try:
        stop = after_step(1, lambda: signal.raise_signal(signal.SIGTERM))
        assert train_in_process(config("term"), [stop]) == "SIGTERM"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [["step-00000001"]]


def test_a_process_that_is_a_rank_already_trains_nothing(
    config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(UserError, match="a launcher started this program: saw WORLD_SIZE=2"):
            train_in_process(config("never"))
    monkeypatch.setattr(in_process, "is_world_open", lambda: True)
    with pytest.raises(UserError, match="this process is a rank already"):
        train_in_process(config("never"))
    assert not config("never").run_folder.exists()


@pytest.mark.slow
def test_the_bits_are_those_of_the_command_also_between_runs_of_other_ranks(config: Callable[..., Config]) -> None:
    sampling = ("evaluate.every=2", "sample.every=2", "checkpoint.every=2")
    assert train_in_process(config("inside", *sampling)) is None
    assert supervise_config(lambda: config("command", *sampling), [], 1) == DONE
    assert supervise_config(lambda: config("pair", *sampling), [], 2) == DONE
    assert train_in_process(config("again", *sampling)) is None
    assert weights(config("inside")) == weights(config("command")) == weights(config("again"))
