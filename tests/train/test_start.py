"""What a run begins with: its own checkpoint, another run's, somebody's weights."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from smoltrain.checkpoint.manifest import list_checkpoint_steps, step_folder
from smoltrain.config.schema import ModelSection, TransformersSection
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.errors import BAD_INPUT, DONE, UserError
from smoltrain.inference.load import load_trained_model
from smoltrain.model.build import build_model
from smoltrain.train.start import (
    StartPoint,
    copy_ancestor_data,
    find_start_point,
    load_initial_weights,
    weight_defining_settings,
)
from tests import folders, launches, tiny


@pytest.fixture(scope="module")
def main(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose run `quickstart` has finished its main phase of 8 steps."""
    folder = tmp_path_factory.mktemp("origin")
    done = tiny.train(folder, "run.stop_after=main")
    assert done.returncode == DONE, done.stderr
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
    assert "the plan changes step" in refused.stderr
    refused = tiny.train(main, "run.name=no", "init.from=quickstart", "init.load=all", "model.hidden_size=16")
    assert (refused.returncode, "model.hidden_size differs" in refused.stderr) == (BAD_INPUT, True)
    assert not (main / "runs" / "no").exists()


def test_the_weights_of_another_run(main: Path):
    found = find_start_point(tiny.load(main, "run.name=w", f"init.from={main / 'runs' / 'quickstart'}"), print)
    assert (found.step, found.manifest) == (0, None)
    config = tiny.load(main)
    tokenizer = Tokenizer.from_folder(main / "runs" / "quickstart" / "tokenizer", config.tokenizer.separator)
    fresh = build_model(config.model)
    load_initial_weights(found, config, fresh, tokenizer)
    theirs = load_trained_model(str(main / "runs" / "quickstart")).model.state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in fresh.state_dict().items())
    at = str(step_folder(main / "runs" / "quickstart" / "checkpoints", 8))
    earlier = find_start_point(tiny.load(main, "run.name=w", f"init.from={at}"), print)
    load_initial_weights(earlier, config, fresh, tokenizer)
    theirs = load_trained_model(at).model.state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in fresh.state_dict().items())
    narrow = tiny.load(main, "model.intermediate_size=32")
    with pytest.raises(UserError, match=r"of another model: intermediate_size: saw 32, want 64"):
        load_initial_weights(found, narrow, build_model(narrow.model), tokenizer)
    other = Tokenizer.train_bpe(["other words"], 300, config.tokenizer.separator)
    with pytest.raises(UserError, match="trained with another tokenizer"):
        load_initial_weights(found, config, fresh, other)


def test_weights_may_be_trained_otherwise_than_they_were_made(tmp_path: Path):
    """What they do not depend on may be another now: how they were drawn, dropout, how far positions reach."""
    made = folders.run(tmp_path)
    found = StartPoint(weights_from=str(made))
    words = ("initializer_range=0.5", "dropout=0.1", "attention_dropout=0.2", "max_position_embeddings=128")
    config = tiny.load(tmp_path, *(f"model.{word}" for word in words), "packing.document_mask=true")
    fresh = build_model(config.model)
    tokenizer = Tokenizer.from_folder(made / "tokenizer", config.tokenizer.separator)
    load_initial_weights(found, config, fresh, tokenizer)
    theirs = load_trained_model(str(made)).model.state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in fresh.state_dict().items())
    for word in ("rope_theta=500", "rms_norm_eps=1e-6", "tie_word_embeddings=false", "positions=learned"):
        other = tiny.load(tmp_path, f"model.{word}")
        with pytest.raises(UserError, match=f"of another model: {word.partition('=')[0]}"):
            load_initial_weights(found, other, fresh, tokenizer)


def test_every_key_of_a_model_is_of_its_weights_or_of_their_training():
    free = {"dropout", "attention_dropout", "initializer_range"}
    learned = ModelSection(**{**folders.CHAT_SHAPE.model_dump(), "positions": "learned"})
    assert weight_defining_settings(learned).keys() == ModelSection.model_fields.keys() - free
    assert weight_defining_settings(folders.CHAT_SHAPE).keys() == weight_defining_settings(learned).keys() - {
        "max_position_embeddings"
    }
    said = {"n_embd": 8, "resid_pdrop": 0.1, "initializer_range": 0.1, "attention_dropout": 0.1, "use_cache": False}
    theirs = TransformersSection(
        kind="transformers", model_type="gpt2", vocab_size=9, max_position_embeddings=8, config=said
    )
    keys = {"kind", "model_type", "vocab_size", "max_position_embeddings", "config.n_embd"}
    assert weight_defining_settings(theirs).keys() == keys


@pytest.mark.slow
def test_a_run_that_begins_with_weights_learns_from_step_one(main: Path):
    path = main / "runs" / "quickstart" / "tokenizer"
    words = [f"tokenizer.name={path}", "tokenizer.vocab_size=null", "phases.main.steps=2", "phases.main.warmup_steps=1"]
    words += ["phases.main.lr=1e-5", "phases.main.final_lr=1e-5", "run.stop_after=main", "init.from=quickstart"]
    done = tiny.train(main, "run.name=tuned", *words)
    assert done.returncode == DONE, done.stderr
    assert "the weights are those of quickstart" in done.stdout
    first = launches.losses(main / "runs" / "tuned")
    before = launches.losses(main / "runs" / "quickstart")
    assert list(first) == [1, 2]
    assert first[1] < before[1] - 0.1, "it begins where the other run ended"


def test_a_transformers_model_takes_a_folder_as_it_is(tmp_path: Path):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tied = {"tie_word_embeddings": True, "num_key_value_heads": 2}
    theirs = LlamaForCausalLM(LlamaConfig(vocab_size=320, max_position_embeddings=64, **shape, **tied))
    theirs.save_pretrained(tmp_path / "folder")
    llama = {"kind": "transformers", "model_type": "llama", "max_position_embeddings": 64}
    sections = [
        TransformersSection.model_validate(llama | {"vocab_size": rows, "config": shape | tied}) for rows in (320, 300)
    ]
    found, config = StartPoint(weights_from=str(tmp_path / "folder")), tiny.load(tmp_path)
    tokenizer = Tokenizer.train_bpe(["a"], 300, config.tokenizer.separator)
    ours = build_model(sections[0])
    load_initial_weights(found, config, ours, tokenizer)
    wanted = theirs.state_dict()
    assert all(torch.equal(x, wanted[name.removeprefix("inner.")]) for name, x in ours.state_dict().items())
    with pytest.raises(UserError, match=r"another vocabulary: saw \(320, 16\), want \(300, 16\)"):
        load_initial_weights(found, config, build_model(sections[1]), tokenizer)


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


def test_devices(monkeypatch: pytest.MonkeyPatch):
    from smoltrain.distributed.world import choose_device

    monkeypatch.setattr(torch.backends, "mps", SimpleNamespace(is_available=lambda: True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == choose_device("cpu").type == "cpu"
    assert choose_device("mps").type == "mps"
    with pytest.raises(UserError, match=r"no such device: saw cuda, want one of auto, cpu, mps; change engine\.device"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto", 3) == torch.device("cuda", 3)
