"""Folders of documents, which most tests of this folder begin with."""

from pathlib import Path

import pytest

from tests.data.tokens.test_prepare import twelve
from tests.data.tokens.test_tokenise import twenty


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Twenty documents, a file each."""
    return twenty(tmp_path)


@pytest.fixture
def shard_root(tmp_path: Path) -> Path:
    """Twelve shards of 25 documents, and a tokenizer in `given`."""
    return twelve(tmp_path)
