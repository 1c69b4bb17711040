"""Where a run begins: at its own checkpoint, at another run's, with somebody's weights, or fresh."""

import shutil
from pathlib import Path

import pytest

from smoltrain.checkpoint.manifest import list_checkpoint_steps, step_folder
from smoltrain.errors import BAD_INPUT, DONE, UserError
from smoltrain.export.export import export_model
from smoltrain.run.verify import verify_run
from smoltrain.training.start_point import StartPoint, copy_ancestor_data, find_start_point
from tests import folders, launches, tiny


@pytest.fixture(scope="module")
def main(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose run `quickstart` has finished its main phase of 8 steps; at-8/ has a copy that stays so."""
    folder = tmp_path_factory.mktemp("ancestor")
    done = tiny.train(folder, "run.stop_after=main")
    assert done.returncode == DONE, done.stderr
    shutil.copytree(folder / "runs", folder / "at-8" / "runs")
    return folder


def rows_and_losses(run: Path) -> dict[int, tuple[float, str]]:
    key = "train/loss_nats_per_token"
    return {line["step"]: (line[key], line["data/ledger"]) for line in launches.metrics(run) if key in line}


@pytest.mark.slow
def test_all_of_another_run_goes_on_as_that_run_would(main: Path):
    continued = tiny.train(main, "run.name=continued", "init.from=quickstart", "init.load=all")
    assert continued.returncode == DONE, continued.stderr
    assert "goes on from step 8 (phase main)" in continued.stdout
    at = step_folder(main / "runs" / "quickstart" / "checkpoints", 6)
    earlier = tiny.train(main, "run.name=earlier", f"init.from={at}", "init.load=all", "run.stop_after=main")
    assert earlier.returncode == DONE, earlier.stderr
    assert "goes on from step 6 (phase main)" in earlier.stdout, "from the checkpoint that was named, not the newest"
    assert list_checkpoint_steps(main / "runs" / "quickstart" / "checkpoints")[-1] == 8, (
        "the first run is left as it was"
    )
    itself = tiny.train(main)
    assert itself.returncode == DONE, itself.stderr
    there, here = (rows_and_losses(main / "runs" / name) for name in ("continued", "quickstart"))
    assert list(there) == [9, 10, 11, 12]
    assert there == {step: value for step, value in here.items() if step > 8}
    assert rows_and_losses(main / "runs" / "earlier") == {step: here[step] for step in (7, 8)}
    again = tiny.train(main, "run.name=continued", "init.from=quickstart", "init.load=all")
    assert (again.returncode, "the plan is complete" in again.stdout) == (DONE, True), "its own checkpoint comes first"


@pytest.mark.slow
def test_all_of_another_run_is_held_to_that_runs_past(main: Path):
    refused = tiny.train(main, "run.name=no", "init.from=quickstart", "init.load=all", "phases.main.lr=1e-3")
    assert refused.returncode == BAD_INPUT
    assert "phases.main.lr: 3e-3 in the run, 1e-3 asked (from step 1 on)" in refused.stderr
    refused = tiny.train(main, "run.name=no", "init.from=quickstart", "init.load=all", "model.hidden_size=16")
    assert (refused.returncode, "model.hidden_size: 32 in the run, 16 asked" in refused.stderr) == (BAD_INPUT, True)
    refused = tiny.train(main, "run.name=no", "init.from=quickstart", "init.load=all", "optimizer=muon")
    assert (refused.returncode, "optimizer.kind: adamw in the run, muon asked" in refused.stderr) == (BAD_INPUT, True)
    assert "Traceback" not in refused.stderr
    assert not (main / "runs" / "no").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("believed")
def test_a_run_of_a_version_with_other_names_of_keys_goes_on_as_it_would_have(main: Path, tmp_path: Path):
    """To the same losses, with nothing to say of it; it verifies before and after, and is exported."""
    same = shutil.copytree(main / "at-8", tmp_path / "same")
    older = shutil.copytree(main / "at-8", tmp_path / "older")
    run = older / "runs" / "quickstart"
    folders.make_older(run)
    assert verify_run(run)
    assert export_model(str(run), tmp_path / "exported").is_dir()
    as_it_was = tiny.train(same, f"data.path={main / 'corpus'}")
    went_on = tiny.train(older, f"data.path={main / 'corpus'}")
    assert (as_it_was.returncode, went_on.returncode) == (DONE, DONE), went_on.stderr
    assert "optimizer" not in went_on.stderr
    assert "changed" not in went_on.stdout
    assert verify_run(run)
    assert rows_and_losses(run) == rows_and_losses(same / "runs" / "quickstart")
    assert max(rows_and_losses(run)) == 12


def test_nothing_to_begin_with(tmp_path: Path):
    missing = tiny.load(tmp_path, "init.from=nowhere", "init.load=all")
    with pytest.raises(UserError, match=r"no such run: saw 'nowhere'.*change init\.from"):
        find_start_point(missing, print)
    run = tmp_path / "runs" / "empty"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("{}")
    with pytest.raises(UserError, match="this run has no checkpoint yet"):
        find_start_point(tiny.load(tmp_path, "init.from=empty", "init.load=all"), print)
    at = "init.from=empty/checkpoints/step-00000003"
    with pytest.raises(UserError, match=r"no checkpoint of this step: saw 3, want a run that has saved one; change in"):
        find_start_point(tiny.load(tmp_path, at, "init.load=all"), print)
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"a Hugging Face folder has weights and nothing else: saw init\.load=all"):
        find_start_point(tiny.load(tmp_path, f"init.from={tmp_path / 'hub'}", "init.load=all"), print)
    assert find_start_point(tiny.load(tmp_path), print) == StartPoint()


def test_a_copy_that_was_cut_short_is_made_again(tmp_path: Path):
    ancestor, config = tmp_path / "old", tiny.load(tmp_path)
    theirs = {"data/index.json": "{}", "data/train.bin": "tokens", "tokenizer/tokenizer.json": "t"}
    theirs |= {"ledger.bin": "12345678", "spikes.jsonl": "{}\n"}
    for name, text in theirs.items():
        (ancestor / name).parent.mkdir(parents=True, exist_ok=True)
        (ancestor / name).write_text(text)
    half = config.run_folder / "data"
    half.mkdir(parents=True)
    (half / "train.bin").write_text("tok")
    copy_ancestor_data(config, StartPoint(step=1, ancestor=ancestor))
    assert {name: (config.run_folder / name).read_text() for name in theirs} == theirs
    (half / "train.bin").write_text("mine")
    copy_ancestor_data(config, StartPoint(step=1, ancestor=ancestor))
    assert (half / "train.bin").read_text() == "mine", "a whole copy is kept"
