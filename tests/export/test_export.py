"""An export is the run's model for transformers alone, says what it is, and never appears unless that was proven."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from smoltrain.config.load import load_config
from smoltrain.errors import Problem, TrainingStopped, UserError
from smoltrain.export import export, verify
from smoltrain.export.marker import default_export_folder, read_verified_marker
from smoltrain.export.verify import VerificationPrompt
from smoltrain.inference.load import LoadedModel, load_trained_model
from smoltrain.model import hf_config, hf_format
from tests import folders, tiny

SYSTEM_4 = ("model.positions=learned", "model.num_key_value_heads=4")
EXPORT = ("README.md", "config.json", "generation_config.json", "model.safetensors", "smoltrain.json")
EXPORT = (*EXPORT, "tokenizer.json", "tokenizer_config.json")


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


# --- what is written


def test_the_folder_and_the_line(run: Path, exported: tuple[Path, str]):
    folder, told = exported
    assert folder == run / "export" / "step-00000012"
    assert sorted(p.name for p in folder.iterdir()) == sorted(EXPORT)
    assert sorted(p.name for p in folder.parent.iterdir()) == [folder.name], "nothing is left beside it"
    assert folders.list_closed_files(folder) == []
    difference = re.fullmatch(
        re.escape(f"export {folder}: LlamaForCausalLM, 28,832 parameters in bfloat16; ")
        + r"transformers alone gives the same logits on 16 prompts \(at most (\S+) apart in fp32\) "
        "and the same greedy text on 4",
        told,
    )
    assert difference, told
    assert float(difference[1]) < 1e-5
    assert read_verified_marker(folder) == read(folder / "smoltrain.json")
    marker = read(folder / "smoltrain.json")
    assert marker["class"] == "LlamaForCausalLM"
    assert (marker["run"], marker["step"], marker["last_step"], marker["num_parameters"]) == (
        "quickstart",
        12,
        12,
        28832,
    )
    assert marker["files"].keys() == set(EXPORT) - {"smoltrain.json"}


def test_weights_keep_dtype_and_bits(run: Path, exported: tuple[Path, str]):
    stored = load_file(run / "checkpoints" / "step-00000012" / "model.safetensors")
    written = load_file(exported[0] / "model.safetensors")
    assert {f"model.{name}" for name in stored} == written.keys()
    assert all(written[f"model.{name}"].equal(x) and x.dtype == torch.bfloat16 for name, x in stored.items())
    about = read(exported[0] / "config.json")
    assert (about["dtype"], about["torch_dtype"], about["tie_word_embeddings"]) == ("bfloat16", "bfloat16", True)
    assert about["eos_token_id"] == about["bos_token_id"] == 0
    assert "pad_token_id" not in about, "the row of a padding id would get no gradient"
    model: Any = AutoModelForCausalLM.from_pretrained(exported[0])
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_transformers_samples_as_the_recipe_says(exported: tuple[Path, str]):
    model: Any = AutoModelForCausalLM.from_pretrained(exported[0])
    settings = model.generation_config
    assert (settings.do_sample, settings.temperature, settings.top_k, settings.top_p) == (True, 0.8, 50, 1.0)
    assert (settings.max_new_tokens, settings.eos_token_id, settings.pad_token_id) == (8, 0, 0)
    tokenizer: Any = AutoTokenizer.from_pretrained(exported[0])
    assert (tokenizer.eos_token, tokenizer.model_max_length) == ("<|endoftext|>", 64)


def test_unspoken_ids_are_never_drawn(tmp_path: Path, believed: None):
    made = folders.run(tmp_path, "model.vocab_size=400")
    folder = export.export_model(str(made), say=lambda line: None)
    assert read(folder / "generation_config.json")["suppress_tokens"] == list(range(320, 400))


def test_an_unfinished_run_says_so(run: Path, tmp_path: Path, believed: None):
    told: list[str] = []
    folder = export.export_model(str(run), tmp_path / "early", 8, told.append)
    assert told[0].startswith(f"export {folder} (unfinished: step 8 of 12): ")
    assert "**unfinished: step 8 of 12.**" in (folder / "README.md").read_text()
    assert read(folder / "smoltrain.json")["step"] == 8
    assert default_export_folder(run, 8).name == "step-00000008"


# --- there and back, and again


def test_an_export_is_loaded_like_a_run(run: Path, exported: tuple[Path, str]):
    first, again = load_trained_model(str(run)), load_trained_model(str(exported[0]))
    assert again.model.section == first.model.section
    assert again.generation == first.generation
    assert (again.step, again.config, again.dtype) == (None, None, torch.bfloat16)
    assert again.tokenizer.fingerprint() == first.tokenizer.fingerprint()
    theirs = again.model.state_dict()
    assert all(theirs[name].equal(x) for name, x in first.model.state_dict().items())


def test_an_export_of_an_export_is_equal(exported: tuple[Path, str], tmp_path: Path, believed: None):
    again = export.export_model(str(exported[0]), tmp_path / "again", say=lambda line: None)
    for name in (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        assert (again / name).read_bytes() == (exported[0] / name).read_bytes(), name
    assert "converted by smoltrain" in (again / "README.md").read_text()


def test_our_own_class_goes_through_the_fresh_process(tmp_path: Path):
    made, told = folders.run(tmp_path, *SYSTEM_4), []
    folder = export.export_model(str(made), say=told.append)
    assert ": SmoltrainForCausalLM, " in told[0]
    assert (folder / "modeling_smoltrain.py").read_bytes() == hf_config.MODELING_FILE.read_bytes()
    assert "from_pretrained(folder, trust_remote_code=True)" in (folder / "README.md").read_text()
    assert load_trained_model(str(folder)).model.section == load_trained_model(str(made)).model.section


OTHERS = {
    "GPT2LMHeadModel": ("positions=learned", "norm=layernorm", "mlp=gelu", "attention_bias=true", "mlp_bias=true"),
    "GPTNeoXForCausalLM": ("norm=layernorm", "mlp=gelu", "tie_word_embeddings=false"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_the_other_classes_go_through_it_too(tmp_path: Path, name: str):
    words = [f"model.{word}" for word in (*OTHERS[name], "num_key_value_heads=4")]
    made, told = folders.run(tmp_path, *words), []
    folder = export.export_model(str(made), say=told.append)
    assert f": {name}, " in told[0]
    assert load_trained_model(str(folder)).model.section == load_trained_model(str(made)).model.section


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "gpt_neox"])
def test_a_model_of_transformers_is_its_own_class(tmp_path: Path, kind: str):
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {} if kind == "gpt2" else {"intermediate_size": 64}
    shape |= {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True} if kind == "qwen3" else {}
    model = {"kind": "transformers", "model_type": kind, "vocab_size": 320, "max_position_embeddings": 64}
    recipe, told = tmp_path / "quickstart.yaml", []
    recipe.write_text(
        yaml.safe_dump(tiny.load(tmp_path).model_dump(mode="json") | {"model": model | {"config": shape}})
    )
    made = folders.run_of(load_config(str(recipe)))
    folder = export.export_model(str(made), say=told.append)
    stored = load_file(made / "checkpoints" / "step-00000012" / "model.safetensors")
    written = load_file(folder / "model.safetensors")
    names = {name.removeprefix("inner."): x for name, x in stored.items()}
    if kind == "gpt_neox":  # transformers writes its head under the older name
        names["embed_out.weight"] = names.pop("lm_head.weight")
    assert names.keys() == written.keys()
    assert all(written[name].equal(x) for name, x in names.items())
    assert folders.list_closed_files(folder) == []


@pytest.mark.slow
def test_a_run_that_was_trained(tmp_path: Path):
    done = tiny.train(tmp_path, "run.stop_after=main")
    assert done.returncode == 0, done.stderr
    told: list[str] = []
    folder = export.export_model(str(tmp_path / "runs" / "quickstart"), say=told.append)
    assert "(unfinished: step 8 of 12): LlamaForCausalLM" in told[0]
    assert "| validation perplexity |" in (folder / "README.md").read_text()


# --- what is refused


def test_an_export_that_is_not_the_model_is_deleted(
    run: Path, exported: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
):
    """The logits are those of the folder, but without another process, which imports transformers for seconds."""
    right = hf_format.convert_to_hf_tensors

    def flipped(*arguments: Any) -> dict[str, torch.Tensor]:
        tensors = right(*arguments)
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] *= -1
        return tensors

    def reload(_loaded: LoadedModel, folder: Path, prompts: list[VerificationPrompt], scratch: Path) -> dict[str, Any]:
        model = load_trained_model(str(folder)).model
        logits = [model(torch.tensor([prompt.ids]))[0].detach().contiguous() for prompt in prompts]
        save_file({str(number): logits_TV for number, logits_TV in enumerate(logits)}, scratch / "logits.safetensors")
        return {"not_loaded": []}

    monkeypatch.setattr(hf_format, "convert_to_hf_tensors", flipped)
    monkeypatch.setattr(verify, "_reload_in_fresh_process", reload)
    before = {p.name: p.read_bytes() for p in exported[0].iterdir()}
    with pytest.raises(TrainingStopped, match=r"the export is not the model: logits differ by up to \S+ on 16 prompts"
                       r", at most 0\.0001 is rounding; the folder was deleted"):  # fmt: skip
        export.export_model(str(run))
    assert {p.name: p.read_bytes() for p in exported[0].iterdir()} == before, "the export before it stays"
    assert [p.name for p in exported[0].parent.iterdir()] == ["step-00000012"]


@pytest.fixture
def occupied(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "place"
    place.mkdir()
    (place / "thesis.txt").write_text("mine")
    yield place
    assert (place / "thesis.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["place"]


def problem(source: Path, out: Path | None) -> Problem:
    with pytest.raises(UserError) as error:
        export.export_model(str(source), out)
    (only,) = error.value.problems
    return only


def test_what_is_not_ours_is_not_overwritten(run: Path, occupied: Path, believed: None):
    assert problem(run, occupied).saw == "files that are no export"
    assert "cannot be made" in problem(run, occupied / "thesis.txt" / "deeper").what
    assert problem(run, occupied / "thesis.txt").saw == "files that are no export"


@pytest.mark.parametrize("out", [".", "", ".."])
def test_the_folder_that_one_is_in_is_not_replaced(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    with pytest.raises(UserError, match=r"the export would replace the folder that you are in: saw .*change the OUT"):
        export.export_model(str(run), out)


def test_an_export_that_was_copied_with_its_run_is_the_copys(
    run: Path, exported: tuple[Path, str], tmp_path: Path, believed: None
):
    place = shutil.copytree(exported[0], tmp_path / "place")
    copy = shutil.copytree(run, tmp_path / "copy")
    folder = export.export_model(str(copy), say=lambda line: None)
    assert (folder.is_relative_to(copy), read(folder / "smoltrain.json")["run"]) == (True, "copy")
    assert problem(copy, place).saw == f"an export of {run.name}", "out there it is the original's"


def test_what_is_ours_is(run: Path, tmp_path: Path, believed: None):
    place = tmp_path / "place"
    place.mkdir()
    export.export_model(str(run), place, 8, lambda line: None)
    export.export_model(str(run), place, 12, lambda line: None)
    assert read(place / "smoltrain.json")["step"] == 12
    other = folders.run(tmp_path / "other", steps=(12,))
    assert problem(other, place).saw == "an export of quickstart"
    assert problem(place, place).what == "the export would replace its source"
    assert problem(place, None).what == "nothing says where the export goes"
    assert read(place / "smoltrain.json")["step"] == 12


def test_a_full_disk_is_told_before_anything_is_written(
    run: Path, tmp_path: Path, believed: None, monkeypatch: pytest.MonkeyPatch
):
    free = type("Usage", (), {"free": 1 << 20})
    monkeypatch.setattr(export.shutil, "disk_usage", lambda place: free)
    assert problem(run, tmp_path / "place").saw == "1 MiB free"
    assert not list(tmp_path.iterdir())
