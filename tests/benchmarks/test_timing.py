"""Timings on shared cores."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import timing


def test_the_median_is_of_clean_calls_and_of_all_where_too_few_are():
    seconds = [1.0, 9.0, 2.0, 3.0, 50.0]
    assert timing.summarise_times(seconds, [0.0, 1.0, 0.09, 0.1, 2.5]) == timing.CallTimes(2.0, "3 of 5", 5)
    assert timing.summarise_times(seconds, [0.05, 0.1, 0.2, 0.3, 9.0]) == timing.CallTimes(
        3.0, "1 of 5, so all count", 5
    )
    assert timing.summarise_times(seconds, [None, 0.0, 0.0, 0.0, 0.0]) == timing.CallTimes(3.0, "not known", 5)


def test_the_words_in_a_narrow_column():
    told = {timing.summarise_times([1.0] * 4, waits) for waits in ([0.0] * 4, [0.0, 1.0, 1.0, 1.0], [None] * 4)}
    assert {(times.num_clean, times.counts_all) for times in told} == {
        ("4/4", False), ("1/4", True), ("not known", False),
    }  # fmt: skip


def test_every_function_is_called_once_a_round_in_turn():
    calls: list[str] = []
    timed = timing.time_interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=4, warm_up=2)
    assert "".join(calls) == "abc" * 6
    assert {name: t.rounds for name, t in timed.items()} == {"a": 4, "b": 4, "c": 4}


def test_a_thread_that_has_to_wait_for_a_core_is_seen():
    """Two threads of this very process, held on one core, wait for each other half of the time."""
    if not timing.read_thread_waits():
        pytest.skip(
            "this kernel does not count waiting; the tests of summarise_times and select_clean_calls give them waits"
        )
    code = """if True:
        import hashlib, os, threading
        from benchmarks.timing import longest_wait_s, read_thread_waits
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        done = threading.Barrier(3)
        def work():
            hashlib.pbkdf2_hmac("sha256", b"", b"", 500_000)
            done.wait()
        before = read_thread_waits()
        workers = [threading.Thread(target=work) for _ in range(2)]
        [worker.start() for worker in workers]
        while done.n_waiting < 2: workers[0].join(0.01)
        print(longest_wait_s(before, read_thread_waits()))
        done.wait()
        """
    waited = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert waited > 0.05


def test_where_nothing_counts_waiting_it_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timing, "PROC", tmp_path)
    assert timing.read_thread_waits() == {}
    assert timing.time_interleaved({"nothing": int}, rounds=3)["nothing"].clean == "not known"
    tasks = tmp_path / "7" / "task"
    for thread, text in {"7": "10 2000000000 3\n", "8": "10 500000000 3\n", "9": ""}.items():
        (tasks / thread).mkdir(parents=True)
        (tasks / thread / "schedstat").write_text(text)
    assert timing.read_thread_waits(7) == {"7": 2.0, "8": 0.5}


def test_a_wait_is_that_of_the_thread_that_waited_most():
    before, after = {"1": 5.0, "2": 1.0, "4": 3.0}, {"1": 5.25, "2": 1.5, "3": 0.375}
    assert timing.longest_wait_s(before, after) == 0.5, "one thread has ended, one is new"
    assert timing.longest_wait_s({}, {}) is None
