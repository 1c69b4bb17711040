"""The promise itself, on real processes: a run that is killed and goes on with other ranks sees the very same rows."""

import io
import json
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smoltrain.run.row_ledger import compare_row_histories, read_row_history
from tests import launches, preloaded, tiny
from tests.faulty_server import FaultyServer

STEPS = 120
SHAPE = (
    "phases.main.steps=90", "phases.continuation.steps=30", "phases.continuation.mix={plays: 1, notes: 3}",
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
        f"[{{name: plays, path: {tiny.text(corpus)}, weight: 2, documents: separator, document_separator: '?'}}, "
        f"{{name: notes, path: {notes}, weight: 1}}]"
    )
    data = f"data={{sources: {sources}, validation_share: 0.2, mode: {mode}, shuffle_rows: 6}}"
    shared = [word for word in tiny.OVERRIDES if not word.startswith("data.")]
    return [data, *shared, *SHAPE, f"run.folder={folder / 'runs'}"]


def killed_at(step: int, launcher: str, own: list[str], folder: Path) -> None:
    """Start, wait for a step, and kill every process of the run without a word."""
    process = launches.start(launcher, own, folder / "log.txt", preloaded.programs())  # SIGKILL is the same to all
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

    histories = [read_row_history(folder / "runs" / "quickstart") for folder in (whole, broken)]
    assert [history.find_mismatch() for history in histories] == [None, None]
    comparison = compare_row_histories(*histories)
    assert comparison.diverges_at is None, f"{comparison} (killed at {kills})"
    assert comparison.common_rows == STEPS * 8
    lines = [launches.metrics(folder / "runs" / "quickstart") for folder in (whole, broken)]
    last = [[line for line in told if "data/ledger" in line][-1] for told in lines]
    assert last[0]["step"] == last[1]["step"] == STEPS
    for key in ("ledger", "rows", "tokens", "unique_rows", "unique_documents", "repeat_factor"):
        assert last[0][f"data/{key}"] == last[1][f"data/{key}"], key
    assert last[0]["data/repeat_factor"] > 1.5, "several epochs"


# ---- over a network that fails


def shards() -> dict[str, bytes]:
    """Parquet files of short documents."""
    files = {}
    for shard in range(3):
        texts = [f"shard {shard}, document {i}: " + "what news from Naples? " * (1 + i % 7) for i in range(150)]
        file = io.BytesIO()
        pq.write_table(pa.table({"text": texts}), file, row_group_size=20)
        files[f"{shard}.parquet"] = file.getvalue()
    return files


def streaming(folder: Path, path_of: Callable[[str], str], *more: str) -> list[str]:
    """A run over the three files as three sources."""
    sources = ", ".join(f"{{name: s{i}, path: '{path_of(f'{i}.parquet')}', weight: {i + 1}}}" for i in range(3))
    data = f"data={{sources: [{sources}], validation_share: 0.1, mode: stream, shuffle_rows: 8, patience_s: 300}}"
    shared = [word for word in tiny.OVERRIDES if not word.startswith("data.")]
    return [
        data,
        *shared,
        *SHAPE[2:],
        "phases.main.steps=60",
        "phases.continuation.mix=null",
        f"run.folder={folder / 'runs'}",
        *more,
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_over_a_failing_server_sees_the_rows_of_a_run_over_a_disk(tmp_path: Path) -> None:
    disk, net = tmp_path / "disk", tmp_path / "net"
    for folder in (disk, net):
        folder.mkdir()
    for name, raw in shards().items():
        (tmp_path / name).write_bytes(raw)
    assert launches.run("torchrun", streaming(disk, lambda name: str(tmp_path / name)), disk / "log.txt") == 0
    with FaultyServer(shards()) as server:
        words = streaming(net, server.url)
        process = launches.start("torchrun", words, net / "log.txt")
        launches.wait_for_step(net / "runs" / "quickstart", 1, process)  # listing is not tried again
        server.faults |= {"unavailable": 0.1, "cut": 0.05, "short": 0.05, "reset": 0.05}
        try:
            assert process.wait(300) == 0, (net / "log.txt").read_text()
        finally:
            launches.kill_all(words)
    assert sum(server.met.values()) > 10, server.met
    ours, theirs = (read_row_history(folder / "runs" / "quickstart") for folder in (disk, net))
    comparison = compare_row_histories(ours, theirs)
    assert (comparison.diverges_at, comparison.common_rows) == (None, 64 * 8)


@pytest.mark.slow
def test_a_shard_that_disappears_ends_the_run_by_name_with_its_checkpoint_intact(tmp_path: Path) -> None:
    with FaultyServer(shards()) as server:
        steady = ("checkpoint.every=5", "phases.main.schedule=constant", "phases.main.final_lr=0")
        words = streaming(tmp_path, server.url, "phases.main.steps=5000", *steady)
        process = launches.start("python", words, tmp_path / "log.txt")
        launches.wait_for_step(tmp_path / "runs" / "quickstart", 6, process)
        del server.files["1.parquet"]
        try:
            assert process.wait(120) == 2
        finally:
            launches.kill_all(words)
        said = (tmp_path / "log.txt").read_text()
        assert "error: a shard is gone: saw HTTP 404, want the file that was there when the data were listed" in said
        assert f"; change {server.url('1.parquet')}" in said
        assert "Traceback" not in said
        server.files |= shards()
        last = launches.metrics(tmp_path / "runs" / "quickstart")[-1]["step"]
        words = streaming(tmp_path, server.url, f"phases.main.steps={last + 5}", *steady)
        assert launches.run("python", words, tmp_path / "log.txt") == 0, (tmp_path / "log.txt").read_text()
