"""The promise itself, on real processes: a run that is killed and goes on with other ranks sees the very same rows."""

import json
import random
import signal
from pathlib import Path

import pytest

from smoltrain import ledger
from tests import launches, tiny

STEPS = 200
SHAPE = (
    "phases.main.steps=150", "phases.continuation.steps=50", "phases.continuation.mix={plays: 1, notes: 3}",
    "evaluate.every=0", "sample.every=0", "checkpoint.every=20", "track.gradients_every=0",
    "packing.document_mask=true",
)  # fmt: skip


def words(folder: Path, corpus: Path, mode: str) -> list[str]:
    """Two sources, one of many files and one of a few, small blocks, several epochs of the smaller."""
    notes = corpus / "notes.jsonl"
    if not notes.exists():
        lines = [json.dumps({"text": f"note {i} " + "of the play " * (i % 9)}) for i in range(120)]
        notes.write_text("\n".join(lines) + "\n")
    sources = (
        f"[{{name: plays, path: {tiny.text(corpus)}, weight: 2, documents: blank_lines}}, "
        f"{{name: notes, path: {notes}, weight: 1}}]"
    )
    data = f"data={{sources: {sources}, validation_share: 0.2, mode: {mode}, shuffle_rows: 6}}"
    shared = [word for word in tiny.OVERRIDES if not word.startswith("data.")]
    return [data, *shared, *SHAPE, f"run.folder={folder / 'runs'}"]


def killed_at(step: int, launcher: str, own: list[str], folder: Path) -> None:
    """Start, wait for a step, and kill every process of the run without a word."""
    process = launches.start(launcher, own, folder / "log.txt")
    launches.wait_for_step(folder / "runs" / "quickstart", step, process)
    process.send_signal(signal.SIGKILL)
    launches.kill_all(own)
    process.wait()
    launches.wait_until_gone(own)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", ["stream", "cached"])
def test_three_kills_and_other_numbers_of_ranks_leave_the_same_ledger(tmp_path: Path, mode: str) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    log = whole / "log.txt"
    assert launches.run("torchrun", words(whole, tmp_path, mode), log) == 0, log.read_text()

    draw = random.Random(mode)
    kills = sorted(draw.sample(range(25, STEPS - 5), 3))
    own = words(broken, tmp_path, mode)
    for step, launcher in zip(kills, ("torchrun", "python", "torchrun"), strict=True):
        killed_at(step, launcher, own, broken)
    assert launches.run("torchrun", own, broken / "log.txt") == 0, (broken / "log.txt").read_text()
    log = (broken / "log.txt").read_text()
    assert "on 1 ranks" in log
    assert log.count("on 2 ranks") == 2

    histories = [ledger.read(folder / "runs" / "quickstart") for folder in (whole, broken)]
    assert [history.fault() for history in histories] == ["", ""]
    comparison = ledger.compare(*histories)
    assert comparison.parts_at is None, f"{comparison} (killed at {kills})"
    assert comparison.common == STEPS * 8
    last = [launches.metrics(folder / "runs" / "quickstart")[-1] for folder in (whole, broken)]
    assert last[0]["step"] == last[1]["step"] == STEPS
    for key in ("ledger", "rows", "tokens", "unique_rows", "unique_documents", "unique_contents", "repeat_factor"):
        assert last[0][f"data/{key}"] == last[1][f"data/{key}"], key
    assert last[0]["data/repeat_factor"] > 1.5, "several epochs"
