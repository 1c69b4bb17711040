"""Records of steps that will be done again, and lines that are broken."""

import json
from pathlib import Path

import pytest

from tests.run.test_track import json_lines, opened


def test_an_interrupted_runs_later_and_broken_lines_are_dropped(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "quickstart"
    run.mkdir(parents=True)
    lines = [{"step": n, "train/lr": n / 10} for n in range(1, 7)]
    lines.insert(3, {"step": 3, "validation/perplexity": 2.0})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    broken = 'null\n12\n[]\n{"no": "step"}\n' + text + '{"step": 7, "ti'
    (run / "metrics.jsonl").write_bytes(broken.encode() + b"\x00\xff\xfe")
    samples = [{"step": n, "prompt": "p\u2028", "text": "t\n"} for n in (2, 3, 4)]
    (run / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples), encoding="utf-8")
    tracker = opened(tmp_path, first_step=3)
    tracker.log_metrics(4, {"train/lr": 0.5})
    tracker.log_samples(4, [("new", "text")])
    tracker.close(0)
    kept = json_lines(run / "metrics.jsonl")
    assert kept[:4] == lines[:4]
    assert (len(kept), kept[4]["step"], kept[4]["train/lr"]) == (5, 4, 0.5)
    assert json_lines(run / "samples.jsonl") == [*samples[:2], {"step": 4, "prompt": "new", "text": "text"}]


def test_steps_that_a_kill_has_lost_are_told_and_those_that_an_error_has_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = opened(tmp_path)
    for step in (1, 2, 3):
        killed.log_metrics(step, {"train/lr": 0.5})
    killed.close(0)  # which says nothing of how it ended
    capsys.readouterr()
    second = opened(tmp_path)  # as nothing was saved
    assert "WARNING: the start before was killed at step 3, and nothing was saved:" in capsys.readouterr().out
    second.log_metrics(1, {"train/lr": 0.5})
    second.log_metrics(2, {"train/lr": 0.5})
    second.close(0)
    third = opened(tmp_path, first_step=1)
    assert "killed at step 2, and nothing later than step 1 was saved:" in capsys.readouterr().out
    third.log_metrics(2, {"train/lr": 0.5})
    third.record_ending("failed", "the loss is nan")
    third.close(1)
    opened(tmp_path, first_step=1).close(0)
    assert "killed" not in capsys.readouterr().out
