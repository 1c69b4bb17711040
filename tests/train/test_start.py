"""What a start finds out once: by the supervisor or by rank 0, and never twice."""

import os
import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch

from smoltrain.errors import DONE, UserError
from smoltrain.train.start import begin_run
from tests import launches, tiny

CPU = torch.device("cpu")
# Imported by every Python process of a command (see `site`): each writes down whose bytes it hashes.
COUNTING = """
import hashlib, os
real = hashlib.file_digest

def counting(file, *args, **more):
    with open(os.environ["HASHED"], "a") as log:
        log.write(os.path.realpath(file.name) + "\\n")
    return real(file, *args, **more)

hashlib.file_digest = counting
"""


def test_a_start_ends_with_the_first_phase_that_is_not_done(tmp_path: Path) -> None:
    settings = tiny.load(tmp_path)
    said: list[str] = []
    start = begin_run(settings, 2, CPU, say=said.append, one_phase=True)
    assert (start.config.run.stop_after, start.last_step, start.has_work) == ("main", 8, True)
    assert (start.rows_per_step, start.point.step, start.notes) == (8, 0, tuple(said))
    whole = begin_run(settings, 2, CPU)
    assert (whole.config, whole.last_step) == (settings, 12)
    assert not (settings.run_folder / "config.yaml").exists(), "a rank writes it, once nothing refuses any more"


def test_a_start_can_be_handed_to_other_processes(tmp_path: Path) -> None:
    start = begin_run(tiny.load(tmp_path), 2, CPU)
    assert pickle.loads(pickle.dumps(start)) == start
    assert len(pickle.dumps(start)) < 1 << 16


def test_a_start_of_a_run_that_is_done_has_no_work(tmp_path: Path) -> None:
    assert tiny.train(tmp_path, "run.stop_after=main").returncode == DONE
    settings = tiny.load(tmp_path, "run.stop_after=main")
    done = begin_run(settings, 1, CPU, one_phase=True)
    assert (done.point.step, done.last_step, done.has_work) == (8, 8, False)
    more = begin_run(tiny.load(tmp_path), 1, CPU, data_ready=True)
    assert (more.point.step, more.last_step, more.has_work) == (8, 12, True)
    assert [start["from_step"] for start in more.record.provenance["starts"]] == [0, 8]
    with pytest.raises(UserError, match=r"model\.intermediate_size: 64 in the run, 32 asked"):
        begin_run(tiny.load(tmp_path, "model.intermediate_size=32"), 1, CPU)


def hashed_by(folder: Path, monkeypatch: pytest.MonkeyPatch, launcher: str, words: list[str]) -> Counter[str]:
    """How often each file was hashed, by any process of a command."""
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(COUNTING)
    log = folder / "hashed"
    log.write_text("")
    monkeypatch.setenv("PYTHONPATH", str(folder / "site"))
    monkeypatch.setenv("HASHED", str(log))
    assert launches.run(launcher, words, folder / "log") == DONE, (folder / "log").read_text()
    return Counter(log.read_text().splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["smoltrain", "torchrun"])
def test_one_start_hashes_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: str) -> None:
    """The local sources, the tokens and the checkpoint: all that was there before."""
    words = tiny.words(tmp_path, "evaluate.every=0", "sample.every=0", "track.gradients_every=0", "checkpoint.every=4")
    run = tmp_path / "runs" / "quickstart"
    assert launches.run("smoltrain", [*words, "run.stop_after=main"], tmp_path / "log") == DONE
    before = [path for path in run.rglob("*") if path.is_file()]
    counts = hashed_by(tmp_path, monkeypatch, launcher, words)
    existing = {os.path.realpath(path): counts[os.path.realpath(path)] for path in before}
    again = {path: times for path, times in existing.items() if times > 1}
    assert not again
    for kind in ("model.safetensors", "rank-00000.pt"):
        [times] = [times for path, times in existing.items() if path.endswith(f"step-00000008/{kind}")]
        assert times == 1, kind
    tokens = [times for path, times in existing.items() if "/data/" in path and path.endswith(".bin")]
    assert tokens
    assert set(tokens) == {1}
    corpus = [counts[os.path.realpath(path)] for path in (tmp_path / "corpus").iterdir()]
    assert set(corpus) == {1}


@pytest.mark.slow
def test_the_data_are_looked_at_once_however_many_phases_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = tiny.words(tmp_path, "evaluate.every=0", "sample.every=0", "track.gradients_every=0")
    counts = hashed_by(tmp_path, monkeypatch, "smoltrain", words)
    said = (tmp_path / "log").read_text()
    assert "restored step 8 on 2 ranks" in said, "of two phases, in processes of their own"
    corpus = [counts[os.path.realpath(path)] for path in (tmp_path / "corpus").iterdir()]
    assert set(corpus) == {1}
    tokens = {path: times for path, times in counts.items() if "/runs/quickstart/data/" in path}
    assert set(tokens.values()) <= {1}
