"""A prepared run, and one with checkpoints of two steps."""

from pathlib import Path
from typing import Any

import pytest

from smoltrain.config.schema import Config
from smoltrain.data.tokens.prepare import prepare_run_data
from tests import tiny
from tests.checkpoint.saving import save_steps


@pytest.fixture
def settings(tmp_path: Path) -> Config:
    found = tiny.load(tmp_path, "engine.ds_config=zero2", "engine.precision=bf16", "model.dropout=0.1")
    prepare_run_data(found)
    return found


@pytest.fixture
def two_checkpoints(settings: Config, ranks: Any) -> Path:
    ranks(2).run(save_steps, settings, [3, 6], 2)
    return settings.run_folder / "checkpoints"
