"""Models come back from runs and from Hugging Face folders; what does not fit is one line."""

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from smoltrain import files
from smoltrain.checkpoint.manifest import Manifest, read_manifest, write_manifest
from smoltrain.config.schema import GenerationSection, ModelSection
from smoltrain.data.tokenizers.companions import eos_token_ids, read_generation_config
from smoltrain.data.tokenizers.tokenizer import TOKENIZER_FILE
from smoltrain.errors import UserError
from smoltrain.inference.find_run import find_run_folder, is_huggingface_folder, locate_run
from smoltrain.inference.load import load_trained_model
from smoltrain.model.decoder import Decoder
from smoltrain.model.hf_config import parse_hf_config
from tests import folders, tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints 8 and 12."""
    return folders.run(tmp_path_factory.mktemp("loading"))


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(made, tmp_path / "runs" / "quickstart")


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A Hugging Face folder to damage."""
    section = tiny.load(tmp_path).model
    assert isinstance(section, ModelSection)
    folders.hub(tmp_path / "hub", section, dtype=torch.float16)
    return tmp_path / "hub"


def edit(file: Path, **changes: Any) -> None:
    """Set keys of a JSON file, or drop them where the value is None."""
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def resave(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a checkpoint and sign it again."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    record = {"bytes": file.stat().st_size, "sha256": files.file_sha256(file)}
    manifest = read_manifest(file.parent)
    assert isinstance(manifest, Manifest)
    write_manifest(file.parent, replace(manifest, files={file.name: record}))


def problem(source: Path | str, step: int | None = None) -> str:
    with pytest.raises(UserError) as error:
        load_trained_model(str(source), step)
    (only,) = error.value.problems
    assert "\n" not in str(only)
    return str(only)


# --- runs


def test_the_newest_checkpoint_or_the_one_asked_for(made: Path, monkeypatch: pytest.MonkeyPatch):
    loaded, earlier = load_trained_model(str(made)), load_trained_model(str(made), 8)
    assert (loaded.step, earlier.step) == (12, 8)
    assert isinstance(loaded.model, Decoder)
    assert not loaded.model.training
    stored = load_file(made / "checkpoints" / "step-00000012" / "model.safetensors")
    assert all(p.dtype == torch.float32 and p.equal(stored[n].float()) for n, p in loaded.model.named_parameters())
    assert loaded.dtype == torch.bfloat16
    assert not loaded.model.state_dict()["norm.weight"].equal(earlier.model.state_dict()["norm.weight"])
    assert loaded.config is not None
    assert (loaded.generation, loaded.seed) == (loaded.config.generation, 1234)
    assert loaded.manifest is not None
    assert loaded.folder == made
    monkeypatch.chdir(made.parent.parent)
    assert load_trained_model("quickstart").folder == Path("runs/quickstart"), "a name under runs/"
    monkeypatch.chdir("/")
    assert load_trained_model("quickstart", runs=made.parent).folder == made


def test_a_damaged_newest_checkpoint_is_passed_over(run: Path, capsys: pytest.CaptureFixture[str]):
    (run / "checkpoints" / "step-00000012" / "model.safetensors").write_bytes(b"cut")
    assert load_trained_model(str(run)).step == 8
    assert "checkpoint of step 12 is passed over" in capsys.readouterr().err
    assert problem(run, 12).startswith("the checkpoint is not whole: saw ")


def test_the_folder_of_a_checkpoint(run: Path, monkeypatch: pytest.MonkeyPatch):
    at = run / "checkpoints" / "step-00000008"
    loaded = load_trained_model(str(at))
    assert (loaded.step, loaded.folder) == (8, run)
    assert load_trained_model(str(at), 12).step == 12, "who names a step as well means that one"
    (run.parent / "best").symlink_to(at)
    assert load_trained_model(str(run.parent / "best")).step == 8
    monkeypatch.chdir(at)
    assert locate_run(".") == (run, 8)
    monkeypatch.chdir(run.parent.parent)
    for name in ("quickstart/checkpoints/step-00000008/", "runs/quickstart/checkpoints/step-00000008"):
        assert locate_run(name) == (Path("runs/quickstart"), 8)
    assert problem(f"{run}/checkpoints/step-00000009").startswith(
        "no checkpoint of this step: saw 9, want one of 8, 12"
    )
    assert problem(f"{run}/checkpoints/step-00000009").endswith("change the RUN argument")
    for name in (f"{run}/checkpoints", f"{run}/checkpoints/step-00000008.tmp", f"{run}/export/step-00000008"):
        assert problem(name).startswith("no such run"), name
    (at / "model.safetensors").write_bytes(b"cut")
    assert problem(at).startswith("the checkpoint is not whole"), "no other one stands in for it"
    with pytest.raises(UserError, match=r"this is one checkpoint of a run: saw .*, want the run, \S+/quickstart;"):
        find_run_folder(str(at))


def test_what_is_no_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    want = "the folder of a run or of its checkpoint, a Hugging Face folder, or a name under runs/ (quickstart)"
    assert problem("quikstart") == f"no such run: saw 'quikstart', want {want}; change the RUN argument"
    text = (run / "config.yaml").read_text().replace("name: quickstart", "name: mine")
    (tmp_path / "mine.yaml").write_text(re.sub("  folder: .*", f"  folder: {run.parent}", text))
    want = "a run: `smoltrain train mine.yaml` makes one"
    assert problem("mine.yaml") == f"a recipe is no run: saw 'mine.yaml', want {want}; change the RUN argument"
    shutil.copytree(run, run.parent / "mine")
    assert f"want the run of this recipe, {run.parent / 'mine'};" in problem("mine.yaml")
    assert f"want the run that it lies in, {run};" in problem(run / "config.yaml")
    assert "want a run: `smoltrain train shakespeare-80m` makes one;" in problem("shakespeare-80m")
    assert problem(run, 9) == "no checkpoint of this step: saw 9, want one of 8, 12; change --checkpoint"
    shutil.rmtree(run / "checkpoints")
    assert problem(run).startswith("this run has no checkpoint yet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm.weight"), "a tensor is missing: saw no norm.weight, want (32,)"),
        (lambda t: t.update(extra=torch.ones(1)), "a tensor is unknown: saw extra"),
        (
            lambda t: t.update({"embed_tokens.weight": t["embed_tokens.weight"][:300].clone()}),
            "embed_tokens.weight has another vocabulary: saw (300, 32), want (320, 32) as the config says",
        ),
        (
            lambda t: t.update({"norm.weight": torch.ones(16)}),
            "norm.weight has another shape: saw (16,), want (32,) as the config says",
        ),
    ],
)
def test_weights_that_do_not_fit_the_config(
    run: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
):
    file = run / "checkpoints" / "step-00000012" / "model.safetensors"
    resave(file, change)
    assert problem(run).startswith(message)
    assert str(file) in problem(run)


def test_a_run_whose_tokenizer_was_exchanged(run: Path):
    many = folders.tokenizer()
    many._inner.add_tokens([f"word{i}" for i in range(100)])
    many.save(run / "tokenizer")
    assert problem(run).startswith("the tokenizer has more ids than the model: saw ")
    assert "want at most the model's 320" in problem(run)
    (run / "tokenizer" / TOKENIZER_FILE).unlink()
    assert problem(run).startswith("the tokenizer is missing")
    assert problem(run).endswith(f"want {TOKENIZER_FILE} as it was written; change the folder {run / 'tokenizer'}")


# --- Hugging Face folders


def test_a_folder_of_hugging_face(hub: Path):
    loaded = load_trained_model(str(hub))
    assert isinstance(loaded.model, Decoder)
    assert (loaded.step, loaded.manifest, loaded.config) == (None, None, None)
    assert (loaded.dtype, loaded.seed, loaded.generation) == (torch.float16, 1234, GenerationSection())
    assert all(p.dtype == torch.float32 for p in loaded.model.parameters())
    assert loaded.tokenizer.separator == folders.SEPARATOR
    assert problem(hub, 8).startswith("this folder has no checkpoints: saw 8")


def test_its_way_to_sample_is_kept(hub: Path):
    about = {"do_sample": True, "temperature": 0.6, "top_k": 40, "max_new_tokens": 7}
    (hub / "generation_config.json").write_text(json.dumps(about))
    want = GenerationSection(temperature=0.6, top_k=40, max_tokens=7)
    assert load_trained_model(str(hub)).generation == want
    edit(hub / "generation_config.json", temperature=-1)
    assert problem(hub).startswith("temperature is not valid: saw -1, want greater than or equal to 0")
    edit(hub / "generation_config.json", do_sample=False)
    assert load_trained_model(str(hub)).generation == GenerationSection(temperature=0, max_tokens=7), "it is greedy"


def test_a_bos_that_its_tokenizer_would_add_is_left_out_and_that_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folders.chat(tmp_path / "chat")
    loaded = load_trained_model(str(tmp_path / "chat"))
    bos = loaded.tokenizer.token_to_id("<|begin|>")
    assert bos not in loaded.tokenizer.encode("the king")
    assert "its tokenizer adds <|begin|> to a text, which is left out here" in capsys.readouterr().err


def test_its_special_tokens_may_be_objects(hub: Path):
    edit(hub / "tokenizer_config.json", eos_token={"content": folders.SEPARATOR, "special": True})
    assert load_trained_model(str(hub)).tokenizer.separator == folders.SEPARATOR
    edit(hub / "tokenizer_config.json", eos_token="</s>")
    assert problem(hub).startswith("the separator is not a special token of the tokenizer: saw '</s>'")
    edit(hub / "tokenizer_config.json", eos_token=None)
    assert problem(hub).startswith("nothing says which token ends a text")


def write(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(values))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(run: Path, hub: Path, value: float):
    resave(run / "checkpoints" / "step-00000012" / "model.safetensors", lambda w: w["norm.weight"].fill_(value))
    assert problem(run).startswith("norm.weight holds values that are no numbers: saw nan or inf")
    tensors = load_file(hub / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = value
    save_file(tensors, hub / "model.safetensors")
    assert problem(hub).startswith("model.layers.1.mlp.up_proj.weight holds values that are no numbers")


def test_a_run_whose_config_asks_for_all_memory(run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "smoltrain.checkpoint.identity.check_checkpoint_identity", lambda *_: None
    )  # a manifest that says the same
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("intermediate_size: 64", "intermediate_size: 16777216"))
    with pytest.raises(UserError, match=r"has another shape: saw \(64, 32\), want \(16777216, 32\)"):
        load_trained_model(str(run))


ODD = [None, True, -1, 0, 1e9, 10**9, "x", [], {}, [1], {"a": 1}, 0.5]


@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_a_config_json_of_anything_is_a_problem_or_a_model(hub: Path, odd: Any):
    """Never a traceback: whatever stands at a key, it is read as it means, or refused."""
    whole = json.loads((hub / "config.json").read_text())
    for key in [*whole, "rope_scaling", "head_dim", "quantization_config", "text_config", "eos_token_id"]:
        write(hub / "config.json", **whole | {key: odd})
        with contextlib.suppress(UserError):
            parse_hf_config(json.loads((hub / "config.json").read_text()), hub)
        eos_token_ids(read_generation_config(hub))


def test_a_prompt_that_is_not_text(run: Path):
    with pytest.raises(UserError, match=r"the prompt is not text: saw 'caf\\udce9', want text in UTF-8"):
        load_trained_model(str(run)).generate_text("caf\udce9", GenerationSection(), greedy=True, seed=0)


def test_a_prompt_that_spells_a_special_token_is_text(run: Path):
    loaded = load_trained_model(str(run))
    told = "".join(loaded.generate_text(folders.SEPARATOR, GenerationSection(max_tokens=2), greedy=True, seed=0))
    assert loaded.tokenizer.separator_id not in loaded.tokenizer.encode(folders.SEPARATOR)
    assert folders.SEPARATOR not in told


ENDS: dict[str, Callable[[Path], object]] = {
    "config.json": lambda f: edit(f / "config.json", eos_token_id=0),
    "a list in config.json": lambda f: edit(f / "config.json", eos_token_id=[0, 7]),
    "its text_config": lambda f: edit(f / "config.json", text_config={"eos_token_id": 0}),
    "generation_config.json": lambda f: write(f / "generation_config.json", eos_token_id=0),
    "a list there": lambda f: write(f / "generation_config.json", eos_token_id=[0, 7]),
    "one of two": lambda f: (write(f / "generation_config.json"), edit(f / "config.json", eos_token_id=0)),
    "special_tokens_map.json": lambda f: write(f / "special_tokens_map.json", eos_token=folders.SEPARATOR),
    "an object there": lambda f: write(f / "special_tokens_map.json", eos_token={"content": folders.SEPARATOR}),
}


@pytest.mark.parametrize("bare", [True, False], ids=["no tokenizer_config", "one without an end"])
@pytest.mark.parametrize("where", ENDS)
def test_the_end_of_a_text_may_stand_in_any_file(hub: Path, where: str, bare: bool):
    if bare:
        (hub / "tokenizer_config.json").unlink()
    else:
        write(hub / "tokenizer_config.json", model_max_length=64)
    assert problem(hub).startswith("nothing says which token ends a text")
    ENDS[where](hub)
    loaded = load_trained_model(str(hub))
    assert (loaded.tokenizer.separator, loaded.stop_ids) == (folders.SEPARATOR, [0, 7] if "list" in where else [0])
    assert "".join(loaded.generate_text("the king", GenerationSection(max_tokens=3), greedy=True, seed=0)) is not None


@pytest.mark.parametrize("pad", ["a", "[PAD]", folders.SEPARATOR, 5, {"content": "b"}])
def test_a_token_that_pads_is_not_needed(hub: Path, pad: object):
    edit(hub / "tokenizer_config.json", pad_token=pad, additional_special_tokens=[None, 3, {"content": 5}, "[X]"])
    assert load_trained_model(str(hub)).tokenizer.num_ids == folders.tokenizer().num_ids


@pytest.mark.parametrize("said", [True, "0", -1, None, [], 1.5, {"id": 0}, 10**9])
def test_an_end_that_is_none(hub: Path, said: object):
    write(hub / "tokenizer_config.json")
    edit(hub / "config.json", eos_token_id=said)
    assert "of a text" in problem(hub) or "ends a text" in problem(hub)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / TOKENIZER_FILE).unlink(), f"the folder has no tokenizer: saw no {TOKENIZER_FILE}"),
        (lambda f: (f / TOKENIZER_FILE).write_text("{}"), "the tokenizer cannot be read"),
        (lambda f: (f / "tokenizer_config.json").unlink(), "nothing says which token ends a text"),
        (lambda f: (f / "tokenizer_config.json").write_text("[]"), "tokenizer_config.json cannot be read"),
        (lambda f: (f / "config.json").write_text("[" * 200_000), "config.json cannot be read: saw values nested"),
        (lambda f: (f / "model.safetensors").write_bytes(b"cut"), "the weights cannot be read"),
        (lambda f: edit(f / "config.json", num_hidden_layers=10**9), "num_hidden_layers is not valid"),
        (lambda f: edit(f / "config.json", architectures=["BloomForCausalLM"]), "the folder's class is not supported"),
        (
            lambda f: edit(f / "config.json", vocab_size=400),
            "model.embed_tokens.weight has another vocabulary: saw (320, 32), want (400, 32)",
        ),
    ],
)
def test_a_folder_that_does_not_fit_itself(hub: Path, damage: Callable[[Path], object], message: str):
    damage(hub)
    assert problem(hub).startswith(message)


def test_a_tokenizer_with_too_many_ids(hub: Path):
    many = folders.tokenizer()
    many._inner.add_tokens([f"word{i}" for i in range(100)])
    many.save(hub)
    assert problem(hub).startswith("the tokenizer has more ids than the model")


def test_a_run_is_no_folder_of_hugging_face(run: Path, hub: Path):
    shutil.copy(hub / "config.json", run)  # an export into the run's own folder would be one; the run comes first
    assert not is_huggingface_folder(run)
    assert load_trained_model(str(run)).step == 12
