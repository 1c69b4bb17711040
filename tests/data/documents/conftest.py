"""What many tests about the files of a source begin with."""

from pathlib import Path

import pytest

from smoltrain.data.tokenizers.tokenizer import Tokenizer
from tests.data.documents.texts import text


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Twelve texts in `source`, and a tokenizer in `given`."""
    (tmp_path / "source").mkdir()
    for i in range(12):
        (tmp_path / "source" / f"{i:02}.txt").write_text(text(i))
    Tokenizer.train_bpe([text(12)], 270, "<|endoftext|>").save(tmp_path / "given")
    return tmp_path
