"""Somebody's weights in a fresh model: a run's, a checkpoint's, a Hugging Face folder's."""

from pathlib import Path

import pytest
import torch

from smoltrain.checkpoint.manifest import step_folder
from smoltrain.config.schema import ModelSection, TransformersSection
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.errors import DONE, UserError
from smoltrain.inference.load import load_trained_model
from smoltrain.model.build import build_model
from smoltrain.model.interface import LanguageModel
from smoltrain.training.initial_weights import load_initial_weights, weight_defining_settings
from smoltrain.training.start_point import StartPoint, find_start_point
from tests import folders, launches, tiny


def assert_same_weights(fresh: LanguageModel, source: Path | str) -> None:
    theirs = load_trained_model(str(source)).model.state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in fresh.state_dict().items())


def test_the_weights_of_another_run(tmp_path: Path):
    made = folders.run(tmp_path)
    found = find_start_point(tiny.load(tmp_path, "run.name=w", f"init.from={made}"), print)
    assert (found.step, found.manifest) == (0, None)
    config = tiny.load(tmp_path)
    tokenizer = Tokenizer.from_folder(made / "tokenizer", config.tokenizer.separator)
    fresh = build_model(config.model)
    load_initial_weights(found.weights_from or "", config, fresh, tokenizer)
    assert_same_weights(fresh, made)
    at = str(step_folder(made / "checkpoints", 8))
    earlier = find_start_point(tiny.load(tmp_path, "run.name=w", f"init.from={at}"), print)
    load_initial_weights(earlier.weights_from or "", config, fresh, tokenizer)
    assert_same_weights(fresh, at)
    narrow = tiny.load(tmp_path, "model.intermediate_size=32")
    with pytest.raises(UserError, match=r"of another model: intermediate_size: saw 32, want 64"):
        load_initial_weights(found.weights_from or "", narrow, build_model(narrow.model), tokenizer)
    other = Tokenizer.train_bpe(["other words"], 300, config.tokenizer.separator)
    with pytest.raises(UserError, match="trained with another tokenizer"):
        load_initial_weights(found.weights_from or "", config, fresh, other)


def test_weights_may_be_trained_otherwise_than_they_were_made(tmp_path: Path):
    """What they do not depend on may be another now: how they were drawn, dropout, how far positions reach."""
    made = folders.run(tmp_path)
    found = StartPoint(weights_from=str(made))
    words = ("initializer_range=0.5", "dropout=0.1", "attention_dropout=0.2", "max_position_embeddings=128")
    config = tiny.load(tmp_path, *(f"model.{word}" for word in words), "packing.document_mask=true")
    fresh = build_model(config.model)
    tokenizer = Tokenizer.from_folder(made / "tokenizer", config.tokenizer.separator)
    load_initial_weights(found.weights_from or "", config, fresh, tokenizer)
    assert_same_weights(fresh, made)
    for word in ("rope_theta=500", "rms_norm_eps=1e-6", "tie_word_embeddings=false", "positions=learned"):
        other = tiny.load(tmp_path, f"model.{word}")
        with pytest.raises(UserError, match=f"of another model: {word.partition('=')[0]}"):
            load_initial_weights(found.weights_from or "", other, fresh, tokenizer)


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
def test_a_run_that_begins_with_weights_learns_from_step_one(tmp_path: Path):
    assert tiny.train(tmp_path, "run.stop_after=main").returncode == DONE
    path = tmp_path / "runs" / "quickstart" / "tokenizer"
    words = [f"tokenizer.name={path}", "tokenizer.vocab_size=null", "phases.main.steps=2", "phases.main.warmup_steps=1"]
    words += ["phases.main.lr=1e-5", "phases.main.final_lr=1e-5", "run.stop_after=main", "init.from=quickstart"]
    done = tiny.train(tmp_path, "run.name=tuned", *words)
    assert done.returncode == DONE, done.stderr
    assert "the weights are those of quickstart" in done.stdout
    first = launches.losses(tmp_path / "runs" / "tuned")
    before = launches.losses(tmp_path / "runs" / "quickstart")
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
    load_initial_weights(found.weights_from or "", config, ours, tokenizer)
    wanted = theirs.state_dict()
    assert all(torch.equal(x, wanted[name.removeprefix("inner.")]) for name, x in ours.state_dict().items())
    with pytest.raises(UserError, match=r"another vocabulary: saw \(320, 16\), want \(300, 16\)"):
        load_initial_weights(found.weights_from or "", config, build_model(sections[1]), tokenizer)
