"""A run and its export, which the tests of this folder share and leave as they are."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from smoltrain.export import export
from smoltrain.inference.load import LoadedModel, load_trained_model
from tests import folders


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    with folders.one_thread():
        yield


@pytest.fixture(scope="package")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama-shaped run of 12 steps with checkpoints 8 and 12, in bf16."""
    return folders.run(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="package")
def exported(run: Path) -> tuple[Path, str]:
    """(Its export, verified in earnest, and what the user read.)"""
    told: list[str] = []
    return export.export_model(str(run), say=told.append), "\n".join(told)


@pytest.fixture
def loaded(run: Path) -> LoadedModel:
    return load_trained_model(str(run))
