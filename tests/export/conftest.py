"""A run and its export, which the tests of this folder share and leave as they are."""

from pathlib import Path

import pytest

from smoltrain.export import export
from smoltrain.inference.load import LoadedModel, load_trained_model
from tests.shared_run import one_thread, run

__all__ = ["one_thread", "run"]


@pytest.fixture(scope="package")
def exported(run: Path) -> tuple[Path, str]:
    """(Its export, verified in earnest, and what the user read.)"""
    told: list[str] = []
    return export.export_model(str(run), say=told.append), "\n".join(told)


@pytest.fixture
def loaded(run: Path) -> LoadedModel:
    return load_trained_model(str(run))
