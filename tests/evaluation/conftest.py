"""A run and its export, which the tests of this folder share and leave as they are."""

from pathlib import Path

import pytest

from smoltrain.export import export
from smoltrain.inference.load import LoadedModel, load_trained_model
from tests.shared_run import one_thread, run

__all__ = ["one_thread", "run"]


@pytest.fixture(scope="package")
def exported(run: Path) -> Path:
    """Its export, which nobody has verified."""
    from smoltrain.export.verify import ExportComparison

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "verify_export", lambda loaded, folder: ExportComparison("Class", 1, 0.0))
        return export.export_model(str(run), say=lambda line: None)


@pytest.fixture(scope="package")
def loaded(run: Path) -> LoadedModel:
    return load_trained_model(str(run))
