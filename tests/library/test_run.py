"""smoltrain.Run reads what a run has written."""

import math
import re
from pathlib import Path

import numpy as np
import pytest

import smoltrain
from smoltrain.files import METRICS_FILE, read_jsonl
from smoltrain.library import run as run_module
from tests.library.conftest import Trained


def test_metrics_are_columns_of_one_length(trained: Trained) -> None:
    metrics = trained.run.metrics()
    assert metrics["step"].tolist() == [1, 2, 3]
    assert metrics["step"].dtype == np.int64
    assert {len(column) for column in metrics.values()} == {3}
    lines = list(read_jsonl(trained.run.folder / METRICS_FILE))
    losses = [line["train/loss_nats_per_token"] for line in lines if "train/loss_nats_per_token" in line]
    assert metrics["train/loss_nats_per_token"].tolist() == losses
    validation = metrics["validation/loss_nats_per_token"]
    assert [math.isnan(loss) for loss in validation] == [True, False, False]
    assert metrics["data/ledger"].dtype == object, "a text"
    assert metrics["data/ledger"][0] == lines[0]["data/ledger"]


@pytest.mark.slow  # pandas is imported
def test_a_data_frame_is_made_of_them(trained: Trained) -> None:
    import pandas  # which datasets and gradio bring

    table = pandas.DataFrame(trained.run.metrics()).set_index("step")
    assert table["custom/square"].to_dict() == {1: 1.0, 2: 4.0, 3: 9.0}


def test_samples_config_and_curves(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    run = smoltrain.Run(trained.run.folder)
    samples = run.samples()
    assert {sample.step for sample in samples} == {2, 3}
    assert {sample.prompt for sample in samples} == set(run.config.sample.prompts)
    assert all(isinstance(sample.text, str) for sample in samples)
    assert run.config.run.name == "trained"
    assert run.stop_reason is None
    monkeypatch.setattr(run_module, "draw_run", lambda plan, folder: (plan.last_step, folder))
    assert run.plot() == (3, run.folder)


def test_a_run_that_has_saved_nothing_is_not_finished(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    text = (trained.run.folder / "config.yaml").read_text(encoding="utf-8")
    text = re.sub(r"stop_after: \w+\n", "stop_after: main\n", text)  # as a run that ended within main has it
    (tmp_path / "new" / "config.yaml").write_text(text, encoding="utf-8")
    assert "stop_after: main" in text
    assert smoltrain.Run(tmp_path / "new").config == trained.run.config, "whatever phase its newest start was in"
    run = smoltrain.Run(tmp_path / "new", stop_reason="SIGINT")
    assert (run.step, run.is_finished, run.metrics()["step"].tolist(), run.samples()) == (0, False, [], [])
    assert repr(run).endswith(": step 0 of 3, stopped by SIGINT>")
    with pytest.raises(smoltrain.UserError):
        run.plot()
    with pytest.raises(smoltrain.UserError, match="no such run"):
        smoltrain.Run(tmp_path)


def test_an_export_is_that_of_the_command(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "export_model", lambda *words: words)
    assert trained.run.export() == (str(trained.run.folder), None, None)
    assert trained.run.export("out", 2) == (str(trained.run.folder), "out", 2)
