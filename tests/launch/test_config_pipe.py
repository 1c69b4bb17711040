"""What a supervisor has read and worked out reaches its ranks as it was."""

import io
from pathlib import Path

import pytest
import torch

from smoltrain.engine.deepspeed_json import read_deepspeed_text
from smoltrain.launch.config_pipe import pack_start, unpack_start
from smoltrain.training.start import begin_run
from tests import tiny


def test_a_start_and_its_deepspeed_config_come_out_as_they_went_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from smoltrain.engine import deepspeed_json

    engine = tmp_path / "mine.json"
    text = '{"zero_optimization": {"stage": 1}}'
    engine.write_text(text)
    monkeypatch.setattr(deepspeed_json, "_remembered_texts", {})
    start = begin_run(tiny.load(tmp_path, f"engine.ds_config={engine}"), 2, torch.device("cpu"))
    packed = pack_start(start)
    engine.write_text("{")  # by somebody who edits it while the run is on
    assert unpack_start(io.BytesIO(packed)) == start
    assert read_deepspeed_text(str(engine)) == text
