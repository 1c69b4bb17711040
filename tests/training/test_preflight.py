"""What could be known at once is said at once: by `show`, and by `train` before a single document is read."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from smoltrain.cli import app, main
from smoltrain.config.load import list_recipes, load_config
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.data.tokens.prepared import UnusedRows
from smoltrain.distributed.world import choose_device
from smoltrain.engine.deepspeed_json import fill_deepspeed_config
from smoltrain.errors import UserError
from smoltrain.kernels import compile
from smoltrain.launch.supervisor import supervise_run
from smoltrain.training import start
from smoltrain.training.preflight import (
    PreflightLine,
    check_recipe,
    check_start,
    describe_epochs,
    describe_learning_rate,
    describe_preflight,
    describe_tokens_per_parameter,
    describe_vocabulary,
)
from tests import folders, tiny

LLAMA = ("model={kind: transformers, model_type: llama, vocab_size: 320, max_position_embeddings: 64}",)
EMPTY = (LLAMA[0].replace("llama", "gpt2"), "model.config={n_layer: 0}")
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
    ((*EMPTY, "optimizer=muon"), "muon has nothing to orthogonalise"),
    (("engine.ds_config=zero2_offload", "optimizer=muon"), "muon does not go with this part of the DeepSpeed config"),
]
# What depends on the machine, which `show` is not told of.
HERE: list[tuple[tuple[str, ...], str]] = [
    (("engine.attention=flash",), "the kernel flash cannot run"),
    (("batch.micro_batch=2", "batch.accumulation=null", "batch.rows_per_step=7"), "7 rows per step do not divide"),
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


# --- what the plan asks of data, model and ranks


def test_a_plan_that_reads_a_small_text_again_and_again_is_warned_of():
    text = (
        "the plan's 81.9M tokens are 1,820.4 epochs of 45,000 training tokens; beyond 4 a token that is read again is "
        "worth less than a new one (Muennighoff et al. 2023): take more data, or lower phases.main.tokens"
    )
    assert describe_epochs(81_920_000, 45_000, "phases.main.tokens") == PreflightLine("epochs", text, warns=True)
    text = "0.5, as 22.5K tokens of 45,000; phases.main.tokens change it"
    assert describe_epochs(22_500, 45_000, "phases.main.tokens") == PreflightLine("epochs", text)
    assert [describe_epochs(tokens, 100, "").warns for tokens in (400, 401)] == [False, True]


def test_tokens_per_parameter_are_a_fact():
    line = describe_tokens_per_parameter(400_000_000, 20_000_000, "phases.main.tokens")
    assert line == PreflightLine(
        "tokens per parameter",
        "20, as 400M tokens for 20M parameters; compute-optimal are about 20 (Hoffmann et al. 2022); "
        "phases.main.tokens change it",
    )


def test_rows_of_the_vocabulary_that_nobody_reads_are_counted():
    smaller = "a smaller vocabulary is model.vocab_size with a tokenizer of as few ids"
    assert describe_vocabulary(320, 300, UnusedRows(57, 0)) == PreflightLine(
        "vocabulary",
        f"320 rows, 20 beyond the tokenizer's 300 ids and 37 of ids that the training tokens never have; {smaller}",
    )
    assert describe_vocabulary(320, 320, UnusedRows(7, 0)).text.startswith(
        "320 rows, 7 of ids that the training tokens never have;"
    )
    assert describe_vocabulary(320, 300, None).text == f"320 rows, 20 beyond the tokenizer's 300 ids; {smaller}"
    assert describe_vocabulary(320, 320, None).text == "320 rows, as many as ids; model.vocab_size"
    least = "257 rows, as many as ids; 190 are single bytes that the text lacks, there so that any text has ids"
    assert describe_vocabulary(257, 257, UnusedRows(0, 190)).text == f"{least}; model.vocab_size"
    assert describe_vocabulary(320, 320, UnusedRows(7, 190)).text.startswith(
        f"320 rows, 7 of ids that the training tokens never have; {smaller}; 190 are single bytes"
    )
    assert describe_vocabulary(320, 320, UnusedRows(0, 0)).text == (
        "320 rows, as many as ids, all of them of ids that the training tokens have; model.vocab_size"
    )


def test_the_rate_is_told_with_the_rows_that_it_is_for(tmp_path: Path):
    by_rank = tiny.load(tmp_path)
    keeps = "batch.rows_per_step=4 keeps those of one rank on any number of them"
    assert describe_learning_rate(by_rank, 32).text == (
        f"0.003 at most, for 32 rows a step, 8 times those of one rank; {keeps}"
    )
    assert describe_learning_rate(by_rank, 4).text == (
        f"0.003 at most, for 4 rows a step; they multiply with the ranks: {keeps}"
    )
    text = "0.0003 at most, for 32 rows a step on any number of ranks, as batch.rows_per_step says"
    assert describe_learning_rate(load_config("smollm2-135m"), 32) == PreflightLine("learning rate", text)


def test_the_numbers_are_those_of_the_prepared_data(tmp_path: Path):
    config = tiny.load(tmp_path, "model.vocab_size=330")
    prepared = prepare_run_data(config, 4)
    ids = set(prepared.train[0].all().tolist())
    letters = {prepared.tokenizer.encode(letter)[0] for letter in map(chr, range(128))}
    unused = prepared.count_unused_rows(330)
    assert unused is not None
    assert sum(unused) == 330 - len(ids) > 10
    assert unused.num_bytes == 128 + len(letters - ids), "of no UTF-8, or of ASCII that is not in the text"
    lines = {line.what: line.text for line in describe_preflight(config, prepared, 1000, 4)}
    epoch = (len(prepared.train[0]) - 1) // 16 * 16
    assert list(lines) == ["epochs", "tokens per parameter", "vocabulary", "learning rate"]
    assert f", as 768 tokens of {epoch:,}; phases.main.tokens or phases.continuation.tokens" in lines["epochs"]
    assert lines["tokens per parameter"].startswith("0.768, as 768 tokens for 1K parameters;")
    num_ids = prepared.tokenizer.num_ids
    assert lines["vocabulary"].startswith(f"330 rows, {330 - num_ids} beyond the tokenizer's {num_ids} ids")
    assert f"; {unused.num_bytes} are single bytes" in lines["vocabulary"]


def test_a_stream_is_not_counted(tmp_path: Path):
    config = tiny.load(tmp_path, "data.mode=stream", "data.streams=1")
    prepared = prepare_run_data(config, 4)
    assert prepared.count_unused_rows(320) is None
    about = [line.what for line in describe_preflight(config, prepared, 1000, 4)]
    assert about == ["tokens per parameter", "vocabulary", "learning rate"]
