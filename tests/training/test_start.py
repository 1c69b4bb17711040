"""What a start finds out once: by the supervisor or by rank 0, and never twice."""

import math
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from smoltrain import files
from smoltrain.config.load import load_config, stop_after_phase
from smoltrain.config.schema import Config
from smoltrain.data.tokens import plan_preparation
from smoltrain.data.tokens.load_prepared import load_prepared_data
from smoltrain.errors import DONE, UserError
from smoltrain.run.row_ledger import LEDGER_FILE
from smoltrain.run.run_folder import SPIKES_FILE, write_run_folder
from smoltrain.training import start as start_module
from smoltrain.training.start import Start, begin_run
from tests import folders, launches, tiny

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


def test_what_the_data_take_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock_s = [0.0]

    def prepare(*_: object) -> None:
        clock_s[0] += 3600.0

    monkeypatch.setattr(start_module, "prepare_run_data", prepare)
    monkeypatch.setattr(start_module, "measure_cpu_peak", lambda _: 1.0)
    monkeypatch.setattr(start_module.time, "perf_counter", lambda: clock_s[0])
    settings = tiny.load(tmp_path)
    seconds = [begin_run(settings, 1, CPU, data_ready=ready).preparation_s for ready in (False, True)]
    assert seconds == [3600.0, 0.0]


def test_a_start_can_be_handed_to_other_processes(tmp_path: Path) -> None:
    start = begin_run(tiny.load(tmp_path), 2, CPU)
    assert pickle.loads(pickle.dumps(start)) == start
    assert len(pickle.dumps(start)) < 1 << 16


def test_a_start_of_a_run_that_is_done_has_no_work(tmp_path: Path) -> None:
    settings = tiny.load(tmp_path, "run.stop_after=main")
    folders.run_of(settings, (8,), states=True)
    done = begin_run(settings, 1, CPU, one_phase=True)
    assert (done.point.step, done.last_step, done.has_work) == (8, 8, False)
    more = begin_run(tiny.load(tmp_path), 1, CPU, data_ready=True)
    assert (more.point.step, more.last_step, more.has_work) == (8, 12, True)
    assert [start["from_step"] for start in more.record.provenance["starts"]] == [0, 8]
    with pytest.raises(UserError, match=r"model\.intermediate_size: 64 in the run, 32 asked"):
        begin_run(tiny.load(tmp_path, "model.intermediate_size=32"), 1, CPU)


# ---- all of another run


def begin(config: Config) -> tuple[Start, list[str]]:
    """A start that has got as far as to write config.yaml and its first steps, and was killed then; what it said."""
    said: list[str] = []
    start = begin_run(config, 1, CPU, say=said.append)
    write_run_folder(start.config, 1, start.record)
    steps = (start.point.step + 1, start.point.step + 2)
    lines = [{"step": step, "train/loss_nats_per_token": 3.0} for step in steps]
    (config.run_folder / files.METRICS_FILE).write_text("".join(map(files.format_json_line, lines)))
    (config.run_folder / LEDGER_FILE).write_bytes(b"its own!")
    return start, said


@pytest.mark.slow
def test_a_run_killed_before_a_checkpoint_of_its_own_begins_with_all_of_the_other_again(tmp_path: Path) -> None:
    """As the same run, also if the other one has trained on meanwhile; its rows are those of the other's again."""
    ancestor = folders.run_of(tiny.load(tmp_path), (8,), states=True)
    (ancestor / LEDGER_FILE).write_bytes(b"ledger-8")
    child = tiny.load(tmp_path, "run.name=child", "init.from=quickstart", "init.load=all")
    first, _ = begin(child)
    (child.run_folder / SPIKES_FILE).write_text("its own")  # a rewind before the first checkpoint
    again, said = begin(child)
    assert said[-1] == "no checkpoint was saved before the run ended, so its 2 steps are done again"
    assert again.point == first.point
    ids = [(start.record.provenance["run_id"], start.record.provenance["wandb_id"]) for start in (first, again)]
    assert ids[0] == ids[1]
    shutil.rmtree(ancestor)
    folders.run_of(tiny.load(tmp_path), (8,), states=True)  # another run under the same name
    with pytest.raises(UserError, match=r"the run, which has no checkpoint yet, began otherwise: saw run_id \w+ of .*"):
        begin_run(child, 1, CPU)


@pytest.mark.slow
def test_a_run_without_checkpoints_may_begin_with_a_later_step_of_the_other(tmp_path: Path) -> None:
    ancestor = folders.run_of(tiny.load(tmp_path), states=True)
    later = ancestor / "checkpoints" / "step-00000012"
    later.rename(tmp_path / "later")
    child = tiny.load(tmp_path, "run.name=child", "init.from=quickstart", "init.load=all")
    begin(child)
    (tmp_path / "later").rename(later)
    (ancestor / LEDGER_FILE).write_bytes(b"ledger12")
    begin(child)
    start = begin_run(child, 1, CPU)
    assert [one["from_step"] for one in start.record.provenance["starts"]] == [8, 12, 12]
    assert (child.run_folder / LEDGER_FILE).read_bytes() == b"ledger12"


@pytest.mark.slow
def test_a_run_that_began_with_nothing_does_not_go_on_from_another(tmp_path: Path) -> None:
    """Its folder has data of its own, in which the other one's place means nothing."""
    folders.run_of(tiny.load(tmp_path), (8,), states=True)
    begin(tiny.load(tmp_path, "run.name=child"))
    with pytest.raises(
        UserError, match=r"began otherwise.*want what .* says of its first start; change init\.from, or"
    ):
        begin_run(tiny.load(tmp_path, "run.name=child", "init.from=quickstart", "init.load=all"), 1, CPU)


# ---- phases in tokens and epochs

NO_STEPS = ("phases.main.steps=null", "phases.continuation.steps=null", "phases.main.warmup_steps=0")
TOKENS = (*NO_STEPS, "phases.main.tokens=512", "phases.continuation.tokens=250")  # 8 and 4 steps of 4 rows of 16
EPOCHS = (*NO_STEPS, "phases.main.epochs=0.1", "phases.continuation.tokens=250")
STEPS = ("phases.main.warmup_steps=0",)
CONSTANT = ("phases.main.schedule=constant", "phases.main.final_lr=0", "phases.continuation.schedule=constant")


def steps_of(config: Config) -> list[int | None]:
    return [phase.steps for phase in config.phases]


def test_a_start_knows_its_plan_in_steps_whatever_the_recipe_says(tmp_path: Path) -> None:
    asked, plain = tiny.load(tmp_path, *TOKENS), tiny.load(tmp_path, *STEPS)
    start = begin_run(asked, 1, CPU, one_phase=True)
    assert start.config == stop_after_phase(plain, "main")
    assert start.requested == stop_after_phase(asked, "main")
    assert (start.last_step, start.plan.last_step) == (8, 12)
    assert start.record.provenance["starts"][0]["asked"] == {
        "phases.main.tokens": 512,
        "phases.continuation.tokens": 250,
    }
    assert "asked" not in begin_run(plain, 1, CPU).record.provenance["starts"][0]
    assert steps_of(begin_run(asked, 2, CPU).config) == [4, 2], "twice the rows, where it begins on two ranks"


def trained(folder: Path, *overrides: str) -> Path:
    """The folder of a run of 4 rows a step with checkpoints of steps 8 and 12, as begun by what overrides ask for."""
    config = tiny.load(folder, *overrides)
    return folders.run_of(begin_run(config, 1, CPU).config, states=True)


def test_a_resume_resolves_to_the_same_steps_on_any_world(tmp_path: Path) -> None:
    trained(tmp_path, *TOKENS)
    for ranks in (1, 2):
        start = begin_run(tiny.load(tmp_path, *TOKENS), ranks, CPU)
        assert (start.point.step, steps_of(start.config), start.rows_per_step) == (12, [8, 4], 4)
        assert not start.record.changes
    assert begin_run(tiny.load(tmp_path, *STEPS), 2, CPU).record.changes == (), "asked for in steps it is the same run"


def test_a_longer_plan_at_a_resume(tmp_path: Path) -> None:
    trained(tmp_path, *TOKENS, *CONSTANT)
    longer = tiny.load(tmp_path, *TOKENS, *CONSTANT, "phases.continuation.tokens=null", "phases.continuation.steps=9")
    assert steps_of(begin_run(longer, 1, CPU).config) == [8, 9]
    words = (
        *TOKENS,
        *CONSTANT,
        "phases.main.tokens=2000",
    )  # 31.25 steps: the continuation would have been the main phase
    with pytest.raises(UserError, match=r"phases\.main\.steps: 8 in the run, 32 asked \(from step 9 on\)"):
        begin_run(tiny.load(tmp_path, *words), 1, CPU)
    with pytest.raises(UserError, match=r"phases\.main\.steps: 8 in the run, 1 asked"):
        begin_run(tiny.load(tmp_path, *TOKENS, *CONSTANT, "phases.main.tokens=64"), 1, CPU)


def test_run_stop_after_ends_a_plan_in_tokens(tmp_path: Path) -> None:
    start = begin_run(tiny.load(tmp_path, *TOKENS, "run.stop_after=main"), 1, CPU)
    assert (start.last_step, start.plan.last_step) == (8, 12)


def test_a_run_that_goes_on_from_another_counts_by_its_rows(tmp_path: Path) -> None:
    run = trained(tmp_path, *TOKENS)
    words = (*TOKENS, "phases.continuation.tokens=500", "run.name=child", f"init.from={run}", "init.load=all")
    with pytest.raises(UserError, match=r"phases\.continuation\.steps: 4 in the run, 8 asked \(from step 10 on\)"):
        begin_run(tiny.load(tmp_path, *words), 2, CPU)
    words = (*words, "phases.continuation.tokens=250")
    start = begin_run(tiny.load(tmp_path, *words), 2, CPU)
    assert (start.point.step, steps_of(start.config), start.rows_per_step) == (12, [8, 4], 4)


def test_epochs_are_counted_where_the_data_are_prepared(tmp_path: Path) -> None:
    config = tiny.load(tmp_path, *EPOCHS)
    start = begin_run(config, 1, CPU)
    prepared = load_prepared_data(config)
    rows = (len(prepared.train[0]) - 1) // 16
    assert steps_of(start.config) == [math.ceil(rows / 10 / 4), 4]
    assert start.record.provenance["starts"][0]["asked"]["phases.main.epochs"] == 0.1
    assert pickle.loads(pickle.dumps(start)) == start
    for ranks in (1, 2):
        again = begin_run(config, ranks, CPU, data_ready=True)
        assert steps_of(again.config)[0] == math.ceil(rows / 10 / (4 * ranks)), "no run has begun yet"
    folders.run_of(start.config, states=True)
    assert steps_of(begin_run(config, 2, CPU).config) == steps_of(start.config), "now one has"


def test_epochs_of_a_run_that_goes_on_from_another_are_those_of_its_data(tmp_path: Path) -> None:
    run = trained(tmp_path, *EPOCHS)
    before = steps_of(begin_run(tiny.load(tmp_path, *EPOCHS), 1, CPU).config)
    words = (*EPOCHS, "run.name=child", f"init.from={run}", "init.load=all", "data.allow_changed=true")
    (tmp_path / "corpus" / "99-more.txt").write_text(" ".join(map(str, range(20_000))), encoding="utf-8")
    child = begin_run(tiny.load(tmp_path, *words), 2, CPU)
    assert steps_of(child.config) == before, "its tokens are copied, not made"
    assert (child.point.step, child.config.run_folder.name) == (12, "child")


def test_data_that_grew_are_refused_or_leave_the_plan_as_it_was(tmp_path: Path) -> None:
    trained(tmp_path, *EPOCHS)
    before = steps_of(begin_run(tiny.load(tmp_path, *EPOCHS), 1, CPU).config)
    words = [word for word in tiny.words(tmp_path, *EPOCHS) if not word.startswith("data.path=")]
    (tmp_path / "corpus" / "99-more.txt").write_text(" ".join(map(str, range(20_000))), encoding="utf-8")
    grown = load_config("quickstart", [*words, f"data.path={tmp_path / 'corpus'}"])
    with pytest.raises(UserError, match="was prepared from other data"):
        begin_run(grown, 1, CPU)
    accepted = load_config("quickstart", [*words, f"data.path={tmp_path / 'corpus'}", "data.allow_changed=true"])
    assert steps_of(begin_run(accepted, 2, CPU).config) == before, "the tokens stay those that were prepared"
    shutil.rmtree(tmp_path / "runs" / "quickstart" / "data")  # prepared anew, there are more of them
    with pytest.raises(UserError, match=r"phases\.main\.steps: 8 in the run, 17 asked"):
        begin_run(accepted, 1, CPU)


def test_a_stream_that_nobody_asked_for_leaves_no_data_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_preparation, "MAX_AUTO_CACHED_MIB", -1)
    config = tiny.load(tmp_path, *EPOCHS)
    with pytest.raises(UserError, match=r"phases\.main\.epochs=0\.1 are: saw a stream, which has no last row"):
        begin_run(config, 1, CPU)
    assert not (config.run_folder / "data" / "index.json").exists()


def test_a_warm_up_that_the_tokens_are_too_few_for_is_refused_with_the_steps(tmp_path: Path) -> None:
    words = (*TOKENS, "phases.main.warmup_steps=9")
    with pytest.raises(UserError, match="saw 9 \\+ 0, want at most the 8 steps that tokens=512 are"):
        begin_run(tiny.load(tmp_path, *words), 1, CPU)
    assert not tiny.load(tmp_path).run_folder.exists()


def hashed_by(folder: Path, monkeypatch: pytest.MonkeyPatch, launcher: str, words: list[str]) -> Counter[str]:
    """How often each file was hashed, by any process of a command."""
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(COUNTING)
    log = folder / "hashed"
    log.write_text("")
    monkeypatch.setenv("PYTHONPATH", str(folder / "site"))
    monkeypatch.setenv("HASHED", str(log))
    assert launches.run(launcher, words, folder / "log", preloads=False) == DONE, (folder / "log").read_text()
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
