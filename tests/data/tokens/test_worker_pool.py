"""Any number of processes makes the same tokens, and none of them outlives the one that started them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokens import token_parts
from smoltrain.data.tokens import tokenise as tokenise_module
from smoltrain.data.tokens.prepare import prepare_run_data
from tests.data.tokens.test_tokenise import contents, given, make, problem


def test_the_bytes_do_not_depend_on_the_number_of_processes(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(token_parts, "PART_BYTES", 1500)
    (root / "source" / "05.txt").write_bytes(b"\xff")
    whole = {}
    for num in (1, 2):
        monkeypatch.setattr(tokenise_module, "num_cores", lambda num=num: num)
        prepared = prepare_run_data(make(root, run__name=f"by{num}"))
        assert prepared.index.sources["data"].bad_records == 1
        whole[num] = contents(root / "runs" / f"by{num}")
    assert whole[1] == whole[2]
    assert {f"data/data/train-{i:05}.bin" for i in range(3)} < set(whole[1])


@pytest.mark.slow
def test_an_error_in_one_of_several_processes_is_the_users_to_read(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(token_parts, "PART_BYTES", 1500)
    monkeypatch.setattr(tokenise_module, "num_cores", lambda: 2)
    for name in ("01.txt", "18.txt"):
        (root / "source" / name).write_bytes(b"\xff")
    config = make(root, data__max_bad_records=1)
    assert "more than 1 records of 'data' are bad" in problem(config)  # one in the first part, one in the last
    assert not list(config.run_folder.rglob("*.partial"))
    before = set(contents(config.run_folder))
    assert prepare_run_data(make(root, data__max_bad_records=2)).index.sources["data"].bad_records == 2
    assert "data/bad-records.jsonl" in before


SCRIPT = """
import sys
from pathlib import Path
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.data.tokens import token_parts, tokenise
from tests.data.tokens.test_tokenise import given

token_parts.PART_BYTES = 2**20  # without `if __name__ == "__main__"`: workers do not run the script again
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
    monkeypatch.setattr(token_parts, "PART_BYTES", 2**20)
    monkeypatch.setattr(tokenise_module, "num_cores", lambda: 1)
    prepare_run_data(given(root, data__mode="cached", run__name="straight"))
    assert contents(root / "runs" / "run") == contents(root / "runs" / "straight")
