"""Two runs are compared row by row, and a run with its own metrics; what a crash leaves behind is no surprise."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoltrain.cli import main
from smoltrain.data.order import EMPTY_LEDGER, extend_ledger
from smoltrain.errors import UserError
from smoltrain.run import row_ledger
from smoltrain.run.row_ledger import RowLedger

B = 4


def digests(num: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 2**64, num, np.uint64)


def write(run: Path, rows: np.ndarray, *, per_step: int = B, skips: tuple[int, ...] = (), metrics: bool = True) -> Path:
    """A run's folder as training leaves it; in each step of `skips` the first update was skipped."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(f"provenance: {{rows_per_step: {per_step}}}\n")
    book = RowLedger(run / "ledger.bin", 0)
    chain, lines, consumed, step = EMPTY_LEDGER, [], 0, 0
    while consumed < len(rows):
        step += 1
        for _ in range(2 if step in skips else 1):
            part = rows[consumed : consumed + per_step]
            book.append(part)
            chain = extend_ledger(chain, sum(map(int, part)))
            consumed += len(part)
        lines.append({"step": step, "data/rows": consumed, "data/ledger": chain})
        lines.append({"step": step, "validation/perplexity": 7.0})
    book.close()
    if metrics:
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def verify(capsys: pytest.CaptureFixture[str], *runs: Path) -> tuple[int, list[str]]:
    """(exit code, what is said beside the line on each run)."""
    with pytest.raises(SystemExit) as left:
        main(["verify", *map(str, runs)])
    told = capsys.readouterr()
    assert isinstance(left.value.code, int)
    beside = (", ledger ", "/data: not looked into")  # the tokens, of which these runs have none
    return left.value.code, [
        line for line in (told.out + told.err).splitlines() if not any(word in line for word in beside)
    ]


# --- writing


def test_a_digest_stands_at_eight_times_its_position(tmp_path: Path):
    path, rows = tmp_path / "ledger.bin", digests(3 * B)
    book = RowLedger(path, 0)
    for start in range(0, len(rows), B):
        book.append(rows[start : start + B])
        assert path.stat().st_size == 8 * (start + B), "a step waits in the process, where kill -9 would lose it"
    assert [path.read_bytes()[8 * p :][:8] for p in range(len(rows))] == [int(d).to_bytes(8, "little") for d in rows]
    assert book.num_lost_rows == 0
    book.close()


@given(written=st.integers(0, 20), stray=st.integers(0, 7), consumed=st.integers(0, 20))
def test_going_on_keeps_what_the_checkpoint_counts_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, written: int, stray: int, consumed: int
):
    path, rows, more = tmp_path_factory.mktemp("run") / "ledger.bin", digests(20), digests(B, 1)
    path.write_bytes(rows[:written].tobytes() + b"\1" * stray)  # a killed run can leave a part of a digest
    book = RowLedger(path, consumed)
    book.append(more)
    book.close()
    kept = min(written, consumed)
    want = [*rows[:kept], *[0] * (consumed - kept), *more]
    assert np.fromfile(path, "<u8").tolist() == want
    assert book.num_lost_rows == consumed - kept


def test_what_was_appended_survives_kill_9(tmp_path: Path):
    code = (
        "import numpy as np, os, signal, sys; from pathlib import Path; from smoltrain.run.row_ledger import RowLedger;"
        "book = RowLedger(Path(sys.argv[1]), 0); book.append(np.arange(1, 5, dtype=np.uint64)); book.sync();"
        "book.append(np.arange(5, 9, dtype=np.uint64)); os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = tmp_path / "ledger.bin"
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert np.fromfile(path, "<u8").tolist() == list(range(1, 9))


def test_sync_reaches_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_ino), real(handle)))
    book = RowLedger(tmp_path / "ledger.bin", 0)
    assert synced == [tmp_path.stat().st_ino], "a crash could lose the new name"
    book.append(digests(B))
    assert len(synced) == 1
    book.sync()
    assert synced[1:] == [(tmp_path / "ledger.bin").stat().st_ino]
    book.close()


# --- one run


def test_a_run_is_what_its_metrics_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = write(tmp_path / "a", digests(10 * B), skips=(3,))
    assert verify(capsys, run) == (0, [])
    history = row_ledger.read_row_history(run)
    assert str(history) == f"{run}: 40 rows (steps 1 to 9), ledger {history.chain[:16]}"


@pytest.mark.parametrize("position", [0, 17, 39])
def test_a_row_that_the_metrics_do_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str], position: int):
    rows = digests(10 * B)
    run = write(tmp_path / "a", rows)
    rows[position] += 1
    rows.tofile(run / "ledger.bin")
    code, (line,) = verify(capsys, run)
    assert code == 1
    assert line.startswith(f"{run}/ledger.bin is not what its metrics say: ledger ")
    assert line.endswith(f", not {row_ledger.read_row_history(run).chain[:16]} after 40 rows")


def test_a_ledger_that_is_shorter_than_its_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = write(tmp_path / "a", digests(10 * B))
    os.truncate(run / "ledger.bin", 8 * 37)
    code, (line,) = verify(capsys, run)
    assert (code, line.partition(": ")[2].partition(", not")[0]) == (1, "37 rows")


def test_a_killed_run_may_be_ahead_of_its_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = write(tmp_path / "a", digests(10 * B))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-2]) + lines[-2][:9])
    assert verify(capsys, run) == (0, [])
    (run / "metrics.jsonl").unlink()
    assert verify(capsys, run) == (0, [])
    assert str(row_ledger.read_row_history(run)).endswith("40 rows (steps 1 to 10), ledger not logged")


def test_lost_digests_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = digests(10 * B)
    run = write(tmp_path / "a", rows)
    os.truncate(run / "ledger.bin", 8 * 30)
    book = RowLedger(run / "ledger.bin", 36)
    book.append(rows[36:])
    book.close()
    assert verify(capsys, run) == (1, [f"{run}/ledger.bin has lost the digests of 6 rows"])
    whole = write(tmp_path / "b", rows)
    lines = [
        f"{run}/ledger.bin has lost the digests of 6 rows",
        "the same 40 rows, but for 6 that are lost: steps 1 to 10",
    ]
    assert verify(capsys, run, whole) == (1, lines)


# --- two runs


def test_equal_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = digests(10 * B)
    one, two = write(tmp_path / "a", rows), write(tmp_path / "b", rows)
    assert verify(capsys, one, two) == (0, ["the same 40 rows: steps 1 to 10"])


def test_a_longer_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = digests(10 * B)
    one, two = write(tmp_path / "a", rows[: 7 * B]), write(tmp_path / "b", rows)
    lines = ["the same 28 rows: steps 1 to 7", f"{two} has 12 more, to step 10"]
    assert verify(capsys, one, two) == verify(capsys, two, one) == (0, lines)


def test_runs_that_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows, others = digests(10 * B), digests(10 * B)
    others[22:] = digests(18, seed=1)
    one, two = write(tmp_path / "a", rows), write(tmp_path / "b", others)
    code, lines = verify(capsys, one, two)
    assert (code, lines) == (
        1,
        [
            "the same 22 rows, then they part: at row 3 of step 6 (position 22)",
            f"{one}: its digest is {int(rows[22]):016x}",
            f"{two}: its digest is {int(others[22]):016x}",
        ],
    )


def test_runs_without_a_common_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one, two = write(tmp_path / "a", digests(8)), write(tmp_path / "b", digests(8, seed=1))
    code, (line, *_) = verify(capsys, one, two)
    assert (code, line) == (1, "they part at once: at row 1 of step 1 (position 0)")


def test_steps_of_another_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows, others = digests(10 * B), digests(10 * B)
    one, two = write(tmp_path / "a", rows), write(tmp_path / "b", rows, per_step=2 * B)
    first = f"a step is 4 rows of {one}, 8 rows of {two}: rows are compared by their position in the run"
    assert verify(capsys, one, two) == (0, [first, f"the same 40 rows: steps 1 to 10 of {one}, steps 1 to 5 of {two}"])
    others[13] += 1
    two = write(tmp_path / "c", others, per_step=2 * B)
    _, (_, line, *_) = verify(capsys, one, two)
    assert line.endswith(f"part: at row 2 of step 4 of {one}, row 6 of step 2 of {two} (position 13)")


@settings(max_examples=200)
@given(data=st.data(), num_steps=st.integers(1, 12), first=st.integers(1, 12), skips=st.sets(st.integers(1, 12)))
def test_a_position_is_found_in_its_step(data: st.DataObject, num_steps: int, first: int, skips: set[int]):
    """Against steps laid out one by one; metrics of the steps from `first` on (a run that went on from another)."""
    first = min(first, num_steps)
    skips = {step for step in skips if step >= first}  # of steps that were never logged nobody can know
    steps = [step for step in range(1, num_steps + 1) for _ in range(B * (2 if step in skips else 1))]
    logged = range(first, data.draw(st.integers(first, num_steps)) + 1)
    ends = [max(i for i, step in enumerate(steps) if step == end) + 1 for end in logged]
    history = row_ledger.RowHistory(Path(), np.ones(len(steps), np.uint64), B, np.array(logged), np.array(ends), "")
    last = max(logged)
    for position, step in enumerate(steps):
        if step <= last or not any(s > last for s in skips):
            assert history.locate_row(position) == (step, position - steps.index(step) + 1)


@settings(max_examples=30)
@given(num=st.integers(1, 50), at=st.integers(0, 49), chunk=st.integers(1, 9))
def test_the_first_difference_is_found_wherever_it_is(
    tmp_path_factory: pytest.TempPathFactory, num: int, at: int, chunk: int
):
    rows, others = digests(num), digests(num)
    others[at:] += 1
    folder = tmp_path_factory.mktemp("runs")
    one, two = write(folder / "a", rows), write(folder / "b", others)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_ledger, "COMPARE_CHUNK", chunk)
        found = row_ledger.compare_row_histories(row_ledger.read_row_history(one), row_ledger.read_row_history(two))
    assert found.diverges_at == (at if at < num else None)


# --- what is no run


def test_a_folder_without_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = write(tmp_path / "a", digests(0))
    what = "error: there are no rows to verify: saw {}, want a run that trained a step; change the RUN argument"
    assert verify(capsys, run) == (2, [what.format(f"no row in {run}/ledger.bin")])
    (run / "ledger.bin").unlink()
    assert verify(capsys, run) == (2, [what.format(f"no ledger.bin in {run}")])
    code, (line,) = verify(capsys, tmp_path / "none")
    assert (code, line.partition(": saw")[0]) == (2, "error: no such run")


def test_a_config_that_no_run_wrote(tmp_path: Path):
    run = write(tmp_path / "a", digests(B))
    (run / "config.yaml").write_text("model: {}\n")
    with pytest.raises(UserError, match="the run's config has no provenance"):
        row_ledger.read_row_history(run)
