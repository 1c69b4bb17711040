"""TensorBoard's event files, read back by TensorBoard's own reader."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smoltrain.engine.layer_gradients import LayerGradient
from smoltrain.run.sink import HISTOGRAM_PREFIX
from smoltrain.run.track import Tracker
from tests import tiny

pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")


def opened(folder: Path, first_step: int = 0) -> Tracker:
    settings = tiny.load(folder, "track.to=[tensorboard]")
    settings.run_folder.mkdir(parents=True, exist_ok=True)
    return Tracker(settings, tiny.run_folder(settings.run_folder), 0, first_step, 12, derived={"parameters": 7})


def read(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "runs" / "quickstart" / "tensorboard"), size_guidance={"scalars": 0})
    return events.Reload()


def curve(events: Any, name: str) -> list[tuple[int, Any]]:
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)]


def texts(events: Any, tag: str) -> list[tuple[int, str]]:
    return [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors(f"{tag}/text_summary")]


def test_tensorboard_reads_numbers_histograms_samples_and_the_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = opened(tmp_path)
    for step in (1, 2):
        tracker.log_metrics(step, {"train/lr": step / 10, "data/ledger": "text"})
    layer = LayerGradient(5.0, np.array([1, 3]), np.array([-1.0, 0.0, 2.0]))
    tracker.log_gradients(2, {"norm": layer})
    tracker.log_samples(2, [("# a", "<script>b</script>\n- c"), ("d", "e")])
    tracker.close(0)
    folder = tmp_path / "runs"
    assert f"{folder}/quickstart/tensorboard; `tensorboard --logdir {folder}` shows it" in capsys.readouterr().out
    events = read(tmp_path)
    assert set(events.Tags()["scalars"]) == {"train/lr", "gradients/norm_before_clipping/norm"}
    assert curve(events, "train/lr") == [(1, 0.1), (2, 0.2)]
    (histogram,) = events.Histograms(HISTOGRAM_PREFIX + "norm")
    value = histogram.histogram_value
    assert (histogram.step, value.num, value.sum_squares) == (2, 4, 25)
    assert (value.min, list(value.bucket_limit), list(value.bucket)) == (-1, [0, 2], [1, 3])
    assert texts(events, "samples/0") == [(2, "    # a<script>b</script>\n    - c\n")], (
        "code, which Markdown leaves alone"
    )
    assert texts(events, "samples/1") == [(2, "    de\n")]
    ((_, config),) = texts(events, "config")
    assert "      hidden_size: 32\n" in config
    assert "      parameters: 7\n" in config


def test_steps_that_are_done_again_stand_there_once(tmp_path: Path) -> None:
    tracker = opened(tmp_path)
    for step in range(1, 7):
        tracker.log_metrics(step, {"train/lr": step / 10})
        tracker.log_samples(step, [("a", f"old {step}")])
    tracker.close(0)
    tracker = opened(tmp_path, first_step=3)
    for step in range(4, 6):
        tracker.log_metrics(step, {"train/lr": float(step)})
    tracker.log_samples(5, [("a", "new 5")])
    tracker.close(0)
    assert curve(read(tmp_path), "train/lr") == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 4.0), (5, 5.0)]
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    shown = EventAccumulator(str(tmp_path / "runs" / "quickstart" / "tensorboard")).Reload()  # what its pages are of
    texts_shown = [(e.step, e.tensor_proto.string_val[0]) for e in shown.Tensors("samples/0/text_summary")]
    assert texts_shown == [(1, b"    aold 1\n"), (2, b"    aold 2\n"), (3, b"    aold 3\n"), (5, b"    anew 5\n")]


def test_a_disk_that_is_full_ends_tensorboard_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    def fail(*_: Any) -> None:
        raise OSError("No space left on device")

    tracker = opened(tmp_path)
    monkeypatch.setattr(RecordWriter, "write", fail)
    said = ""
    step = 0
    for step in range(1, 500):  # its thread writes, and the next call tells
        tracker.log_metrics(step, {"train/lr": 0.5})
        said += capsys.readouterr().out
        if "WARNING" in said:
            break
        time.sleep(0.01)
    tracker.log_metrics(step + 1, {"train/lr": 0.5})
    tracker.close(0)
    (warning,) = [line for line in (said + capsys.readouterr().out).splitlines() if line.startswith("WARNING")]
    assert warning.startswith(f"WARNING: tensorboard is dropped at step {step} (No space left on device); ")
    assert len((tmp_path / "runs" / "quickstart" / "metrics.jsonl").read_text().splitlines()) == step + 1
