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
    """A tiny Llama-shaped run with checkpoints 8 and 12, in bf16; it was trained in rows of 16 tokens, of 64."""
    return folders.run(tmp_path_factory.mktemp("evaluation"))


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
