"""The shipped quickstart, whole: what README promises of it."""

import json
import re
from pathlib import Path

import pytest

from smoltrain.checkpoint.manifest import list_checkpoint_steps
from smoltrain.config.load import load_config
from smoltrain.errors import DONE
from tests import launches


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_quickstart_learns_to_write_something_like_a_play(tmp_path: Path) -> None:
    assert launches.run("smoltrain", [f"run.folder={tmp_path / 'runs'}"], tmp_path / "log", timeout_s=900) == DONE
    run = tmp_path / "runs" / "quickstart"
    validation = [
        line["validation/loss_nats_per_token"] for line in launches.metrics(run) if "validation/perplexity" in line
    ]
    assert validation[-1] < validation[0] - 0.4
    assert validation[-1] < 4.1, "AdamW's recipe ended at 4.53; a table of word frequencies reaches about 6"
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    last = [s["text"] for s in samples if s["step"] == samples[-1]["step"]]
    for text in last:
        assert text.count("\n") >= 4, "lines break"
    name = r"\*\*[A-Z][A-Za-z ]*[A-Z][A-Za-z ]*\*\*"  # as **KING HENRY** or **First LORD**
    assert any(re.search(name, text) for text in last), "speakers"
    phases = load_config("quickstart").phases
    assert phases[1].steps == 50
    assert {phases[0].num_steps, phases[0].num_steps + 50} <= set(list_checkpoint_steps(run / "checkpoints"))
    assert (run / "plots" / "training.png").stat().st_size > 10_000
    assert list((run / "wandb").glob("offline-run-*")), "one folder per start, one run id"
