"""A loader opens what was prepared."""

from pathlib import Path

import pytest

from smoltrain.data.rows.open_loader import open_loader
from smoltrain.errors import UserError
from tests.data.tokens.test_tokenise import make, twenty


@pytest.fixture
def root(tmp_path: Path):
    return twenty(tmp_path)


def test_open_before_prepare(root: Path):
    with pytest.raises(UserError, match="the data are not prepared"):
        open_loader(make(root), 0, 1, rows_per_step=4, accumulation=2)
