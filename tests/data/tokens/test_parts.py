"""Parts of the tokens: a killed `prepare` goes on with whole ones, and any number of processes makes the same ones."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from smoltrain.data.documents import retry
from smoltrain.data.documents.held_out import is_held_out
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokens import token_files
from smoltrain.data.tokens import tokenise as tokenise_module
from smoltrain.data.tokens.prepare import prepare_run_data
from tests.data.tokens.test_tokenise import contents, given, make, problem, twenty


@pytest.fixture
def root(tmp_path: Path):
    return twenty(tmp_path)


def test_the_tail_of_many_parts(root: Path, monkeypatch: pytest.MonkeyPatch):
    """Three files whose names the hash all puts on one side, each of them a part."""
    monkeypatch.setattr(tokenise_module, "PART_BYTES", 1)
    monkeypatch.setattr(tokenise_module, "num_cores", lambda: 1)
    names = [f"{i:03}.txt" for i in range(100) if not is_held_out(f"{i:03}.txt", 0.3)][:3]
    for path in (root / "source").iterdir():
        path.unlink()
    for i, name in enumerate(names):
        (root / "source" / name).write_text(f"number {i} " * 50 * (i + 1))
    prepared = prepare_run_data(make(root))
    (train,), (validation,) = prepared.train, prepared.validation
    assert len(prepared.index["sources"]["data"]["train"]["files"]) == 5
    ids = np.concatenate([train.all(), validation.all()])
    ends = np.flatnonzero(ids == prepared.tokenizer.separator_id)
    assert len(ends) == 3
    cut = len(train)
    assert ends[1] < cut < ends[2]  # in the last document, which is half of all
    assert train.starts.tolist() == [0, ends[0] + 1, ends[1] + 1]
    assert validation.starts.tolist() == [0]
    assert validation.hashes.tolist() == train.hashes[2:].tolist()
    everything = train.rows(np.arange(cut - 9), 10)
    assert (everything == np.lib.stride_tricks.sliding_window_view(ids[:cut], 10)).all()


def test_a_kill_before_any_rename_leaves_nothing_that_harms(root: Path, monkeypatch: pytest.MonkeyPatch):
    """What the disk holds before each rename is what a kill there would leave: prepare again from each such state."""
    monkeypatch.setattr(tokenise_module, "PART_BYTES", 1500)  # three parts
    monkeypatch.setattr(tokenise_module, "num_cores", lambda: 1)
    config, states = make(root), []
    commit = token_files.commit_partial

    def recording(final: Path) -> None:
        states.append(shutil.copytree(config.run_folder, root / f"state{len(states)}"))
        commit(final)

    monkeypatch.setattr(token_files, "commit_partial", recording)
    prepare_run_data(config)
    monkeypatch.setattr(token_files, "commit_partial", commit)
    whole = contents(config.run_folder)
    assert (
        len(states) == 3 * (2 * 3 + 1) + 2 * 2 + 1
    )  # of each part and side 3 files, and a record; of sides; the index
    for state in states:
        shutil.rmtree(config.run_folder)
        shutil.move(state, config.run_folder)
        for leftover in (*config.run_folder.rglob("*.partial"), *config.run_folder.glob("tokenizer/*")):
            leftover.write_bytes(leftover.read_bytes()[:7])  # and cut short by a power failure
        prepare_run_data(config)
        assert contents(config.run_folder) == whole


def test_a_killed_prepare_goes_on_with_the_parts_that_are_whole(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenise_module, "PART_BYTES", 1500)
    monkeypatch.setattr(tokenise_module, "num_cores", lambda: 1)
    Tokenizer.train_bpe(["This is document"], 262, "<|endoftext|>").save(root / "given")
    read, tokenise = retry.read_records_with_retry, tokenise_module.TokeniseJob.tokenise
    opened: list[str] = []

    def dying(work: tokenise_module.TokeniseJob, number: int) -> None:
        if number == 2:
            raise KeyboardInterrupt
        tokenise(work, number)

    def counting(shard: Any, *rest: Any, **options: Any) -> Any:
        opened.append(shard.name)
        return read(shard, *rest, **options)

    monkeypatch.setattr(retry, "read_records_with_retry", counting)
    prepare_run_data(given(root, run__name="straight"))
    straight = contents(root / "runs" / "straight")
    assert len(opened) == 20
    monkeypatch.setattr(tokenise_module.TokeniseJob, "tokenise", dying)
    with pytest.raises(KeyboardInterrupt):
        prepare_run_data(given(root))
    monkeypatch.setattr(tokenise_module.TokeniseJob, "tokenise", tokenise)
    folder = root / "runs" / "run" / "data" / "data"
    for damage in ("none", "cut", "altered", "settings"):
        work = root / "runs" / damage
        shutil.copytree(root / "runs" / "run", work)
        second = work / "data" / "data" / "train-00001.bin"
        raw = second.read_bytes()
        if damage == "cut":
            second.write_bytes(raw[:-2])
        elif damage == "altered":
            second.write_bytes(b"\1" + raw[1:])
        opened.clear()
        if damage == "settings":
            prepare_run_data(given(root, run__name=damage, data__max_document_mib=1))
            assert len(opened) == 20
            continue
        prepare_run_data(given(root, run__name=damage))
        assert len(opened) == (4 if damage == "none" else 12), damage
        assert contents(work) == straight
    assert (folder / "part-00001.json").exists()


# ---- several processes


def test_the_bytes_do_not_depend_on_the_number_of_processes(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenise_module, "PART_BYTES", 1500)
    (root / "source" / "05.txt").write_bytes(b"\xff")
    whole = {}
    for num in (1, 2):
        monkeypatch.setattr(tokenise_module, "num_cores", lambda num=num: num)
        prepared = prepare_run_data(make(root, run__name=f"by{num}"))
        assert prepared.index["sources"]["data"]["bad_records"] == 1
        whole[num] = contents(root / "runs" / f"by{num}")
    assert whole[1] == whole[2]
    assert {f"data/data/train-{i:05}.bin" for i in range(3)} < set(whole[1])


@pytest.mark.slow
def test_an_error_in_one_of_several_processes_is_the_users_to_read(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenise_module, "PART_BYTES", 1500)
    monkeypatch.setattr(tokenise_module, "num_cores", lambda: 2)
    for name in ("01.txt", "18.txt"):
        (root / "source" / name).write_bytes(b"\xff")
    config = make(root, data__max_bad_records=1)
    assert "more than 1 records of 'data' are bad" in problem(config)  # one in the first part, one in the last
    assert not list(config.run_folder.rglob("*.partial"))
    before = set(contents(config.run_folder))
    assert prepare_run_data(make(root, data__max_bad_records=2)).index["sources"]["data"]["bad_records"] == 2
    assert "data/bad-records.jsonl" in before


SCRIPT = """
import sys
from pathlib import Path
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.data.tokens import tokenise
from tests.data.tokens.test_tokenise import given

if __name__ == "__main__":
    tokenise.PART_BYTES = 2**20
    tokenise.num_cores = lambda: 2
    prepare_run_data(given(Path(sys.argv[1]), data__mode="cached", run__name=sys.argv[2]))
"""


@pytest.mark.slow
def test_kill_9_in_the_middle_of_several_processes(root: Path, monkeypatch: pytest.MonkeyPatch):
    """None of them outlives the one that started them, and what they left serves the next."""
    Tokenizer.train_bpe(["This is document"], 262, "<|endoftext|>").save(root / "given")
    for i in range(4):
        (root / "source" / f"{i:02}.txt").write_text(f"This is document {i:02}. " * 60_000)
    (root / "script.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}

    def start(name: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, str(root / "script.py"), str(root), name], env=environment)

    process, folder = start("run"), root / "runs" / "run" / "data" / "data"
    deadline = time.monotonic() + 60
    while not list(folder.glob("part-*.json")) or not list(folder.glob("*.partial")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert len(workers) >= 2
    assert not psutil.wait_procs(workers, timeout=10)[1]
    whole = [folder / f"train-{path.stem[-5:]}.bin" for path in folder.glob("part-*.json")]
    done = {path.name: path.stat().st_mtime_ns for path in whole if path.exists()}
    assert start("run").wait() == 0
    assert len(done) >= 1
    assert {name: (folder / name).stat().st_mtime_ns for name in done} == done
    monkeypatch.setattr(tokenise_module, "PART_BYTES", 2**20)
    monkeypatch.setattr(tokenise_module, "num_cores", lambda: 1)
    prepare_run_data(given(root, data__mode="cached", run__name="straight"))
    assert contents(root / "runs" / "run") == contents(root / "runs" / "straight")


def test_the_plan_of_the_parts_is_a_function_of_the_shards_alone(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenise_module, "PART_BYTES", 1000)
    monkeypatch.setattr(tokenise_module, "num_cores", lambda: 1)
    Tokenizer.train_bpe(["This is document"], 262, "<|endoftext|>").save(root / "given")
    about = prepare_run_data(given(root)).index["sources"]["data"]["train"]
    sizes = [path.stat().st_size for path in sorted((root / "source").iterdir())]
    assert sizes == [210] * 20  # so five files are a part
    assert [name for name in about["files"] if name.endswith(".bin")] == [f"train-{i:05}.bin" for i in range(4)]
