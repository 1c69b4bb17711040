"""A tiny run on one thread, which all tests of a folder share and leave as it is: for its conftest.py."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import folders


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    with folders.one_thread():
        yield


@pytest.fixture(scope="package")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama-shaped run of 12 steps with checkpoints 8 and 12, in bf16; it read rows of 16 tokens, of 64."""
    return folders.run(tmp_path_factory.mktemp("run"))
