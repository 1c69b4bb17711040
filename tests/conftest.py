"""What every test may use."""

import os
from collections.abc import Callable, Iterator

import hypothesis
import pytest

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tests.ranks import Ranks

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
