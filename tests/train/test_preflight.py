"""What could be known at once is said at once: by `show`, and by `train` before a single document is read."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from smoltrain.cli import app, main
from smoltrain.config.load import list_recipes
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.distributed.world import choose_device
from smoltrain.engine.deepspeed_json import fill_deepspeed_config
from smoltrain.errors import UserError
from smoltrain.kernels import compile
from smoltrain.launch.supervisor import supervise_run
from smoltrain.train import start
from smoltrain.train.preflight import check_recipe, check_start
from tests import folders, tiny

LLAMA = ("model={kind: transformers, model_type: llama, vocab_size: 320, max_position_embeddings: 64}",)
WRONG: list[tuple[tuple[str, ...], str]] = [
    (("engine.ds_config=zero9",), "no such DeepSpeed config: saw 'zero9'"),
    (("engine.ds_config=gone.json",), "no such DeepSpeed config"),
    (("engine.ds_config=TMP/list.json",), "the DeepSpeed config is not an object"),
    (("engine.ds_config=TMP/stage.json",), "has no ZeRO stage"),
    (("engine.ds_config=TMP/optimizer.json",), "has a section that the recipe owns"),
    (("engine.ds_config=TMP/clipping.json",), "contradicts the recipe: saw gradient_clipping = 7"),
    (("engine.ds_config=zero0", "engine.precision=bf16"), "ZeRO-0 in bf16 would not be the optimizer"),
    (("tokenizer=gpt2", "tokenizer.vocab_size=null"), "the tokenizer has more ids than the model: saw 50,257"),
    (("tokenizer=smollm2", "tokenizer.vocab_size=null"), "saw 49,152, want at most model.vocab_size = 320"),
    (("tokenizer=TMP/large", "tokenizer.vocab_size=null"), "saw 400, want at most model.vocab_size = 320"),
    (("model={kind: transformers, model_type: lama, vocab_size: 320, max_position_embeddings: 64}",), "'lama'"),
    ((*LLAMA, "model.config={hidden_size: wide}"), "transformers refuses this config"),
]
# What depends on the machine, which `show` is not told of.
HERE: list[tuple[tuple[str, ...], str]] = [
    (("engine.attention=flash",), "the kernel flash cannot run"),
    (("batch.micro_batch=2", "batch.accumulation=null", "batch.rows_per_step=6"), "6 rows per step do not divide"),
    (("engine.compile=on",), "torch.compile cannot run here"),
    (("init.from=nowhere",), "no such run: saw 'nowhere'"),
    (("init.from=other", "model.num_hidden_layers=3"), "the weights are of another model: num_hidden_layers"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    stage = '"zero_optimization": {"stage": 2}'
    texts = {
        "list": "[]",
        "stage": '{"zero_optimization": {"stage": 7}}',
        "optimizer": f'{{"optimizer": {{}}, {stage}}}',
        "clipping": f'{{"gradient_clipping": 7, {stage}}}',
    }
    for name, text in texts.items():
        (folder / f"{name}.json").write_text(text)
    words = [chr(65 + a) + chr(65 + b) + chr(65 + c) for a in range(26) for b in range(20) for c in range(3)]
    tokenizer = Tokenizer.train_bpe([" ".join(words)], 400, "<|endoftext|>")
    assert tokenizer.num_ids == 400
    tokenizer.save(folder / "large")
    return folder


def overrides(words: tuple[str, ...], files: Path) -> list[str]:
    return [word.replace("TMP", str(files)) for word in words]


@pytest.mark.parametrize(("words", "told"), WRONG, ids=[" ".join(words)[:60] for words, _ in WRONG])
def test_show_finds_it(tmp_path: Path, files: Path, words: tuple[str, ...], told: str, capsys: Any):
    with pytest.raises(SystemExit) as left:
        main(["show", "quickstart", *tiny.words(tmp_path, *overrides(words, files))])
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


@pytest.mark.parametrize(("words", "told"), WRONG + HERE, ids=[" ".join(words)[:60] for words, _ in WRONG + HERE])
def test_train_finds_it_before_the_data_are_touched(
    tmp_path: Path, files: Path, words: tuple[str, ...], told: str, monkeypatch: pytest.MonkeyPatch
):
    if "init.from=other" in words:
        folders.run(tmp_path, "run.name=other")
    monkeypatch.setattr(start, "prepare_run_data", None)
    monkeypatch.setattr(shutil, "which", lambda _: None)  # no compiler
    monkeypatch.setattr(
        compile, "missing_for_compile", compile.missing_for_compile.__wrapped__
    )  # what was found before is not remembered
    with pytest.raises(UserError) as caught:
        supervise_run("quickstart", tiny.words(tmp_path, *overrides(words, files)), 2)
    (line,) = str(caught.value).splitlines()
    assert told in line
    assert not (tmp_path / "runs" / "quickstart").exists()


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_can_be_shown(name: str):
    assert CliRunner().invoke(app, ["show", name]).exit_code == 0


def test_what_is_not_known_yet_is_not_compared(tmp_path: Path):
    (tmp_path / "whole.json").write_text('{"train_batch_size": 512, "zero_optimization": {"stage": 2}}')
    settings = tiny.load(tmp_path, f"engine.ds_config={tmp_path / 'whole.json'}")
    check_recipe(settings)
    with pytest.raises(UserError, match="contradicts the recipe: saw train_batch_size = 512"):
        check_start(settings, choose_device("cpu"), 1, 4)
    tree = fill_deepspeed_config(tiny.load(tmp_path), precision=None, accumulation=None, world_size=None)
    assert "auto" in (tree["bf16"]["enabled"], tree["train_batch_size"])
