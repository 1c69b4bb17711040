"""What every test may use."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tests.ranks import Ranks

LONGEST_FILES = (  # minutes or tens of seconds each, from the longest on
    "whole_runs/test_signals.py", "benchmarks/test_gpu_check.py", "test_commands.py", "whole_runs/test_elastic_data.py",
    "engine/test_shards.py", "engine/test_muon.py", "run/test_wandb_run.py", "whole_runs/test_quickstart.py",
    "whole_runs/test_crash.py", "whole_runs/test_systems.py", "tune/test_tune.py", "whole_runs/test_disk.py",
    "launch/test_supervisor.py", "test_wheel.py", "whole_runs/test_horizon.py",
    "test_examples.py", "kernels/test_loss.py", "benchmarks/test_train.py", "benchmarks/test_time_to_loss.py",
    "whole_runs/test_terminal.py", "engine/test_once_per_step.py", "launch/test_in_process.py",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Workers (-n 2 --dist loadfile) take files in the order below; xdist's own puts files of few tests last."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False
    _heed_keyboard()


def _heed_keyboard() -> None:
    """A shell's `&` leaves Ctrl-C and its kin ignored, which programs inherit: tests would signal nobody, and pass."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGQUIT) == signal.SIG_IGN:
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that no worker is left alone with one of them in the end."""
    here = Path(__file__).parent

    def place(item: pytest.Item) -> int:
        name = item.path.relative_to(here).as_posix() if item.path.is_relative_to(here) else ""
        return LONGEST_FILES.index(name) if name in LONGEST_FILES else len(LONGEST_FILES)

    items.sort(key=place)  # stable: the others stay in their order


hypothesis.settings.register_profile("smoltrain", deadline=None)  # no test depends on how fast a machine is
hypothesis.settings.load_profile("smoltrain")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """ranks(2) is a pair of gloo ranks that lives as long as the session."""
    started: dict[int, Ranks] = {}

    def of_size(size: int) -> Ranks:
        if size not in started:
            started[size] = Ranks(size)
        return started[size]

    yield of_size
    for group in started.values():
        group.close()


@pytest.fixture
def believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports are published without a second process that compares them."""
    from smoltrain.export import export
    from smoltrain.export.verify import ExportComparison

    monkeypatch.setattr(export, "verify_export", lambda loaded, folder: ExportComparison("Class", 1, 0.0))
