"""What came in beside weights and tokenizer goes out beside them, unless training changed it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from smoltrain.cli.models import generate_command
from smoltrain.config.load import read_run_config
from smoltrain.data.tokenizers.companions import read_companions, unsupported_generation_settings
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokens.load_prepared import load_prepared_data
from smoltrain.errors import UserError
from smoltrain.export import export
from smoltrain.inference.load import LoadedModel, load_trained_model
from smoltrain.training.initial_weights import copy_generation_config
from tests import folders, tiny

TALK = [{"role": "user", "content": "Who is king?"}, {"role": "bot", "content": "Nobody."}]
SHAPE = tuple(f"model.{k}={v}" for k, v in folders.CHAT_SHAPE.model_dump().items() if k != "kind")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with folders.one_thread():
        yield


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def continued(folder: Path, chat: Path, *overrides: str) -> Path:
    """A run that took weights and tokenizer of a folder, its checkpoints made by hand."""
    words = (*SHAPE, f"init.from={chat}", f"tokenizer.name={chat}", "tokenizer.vocab_size=null", *overrides)
    settings = tiny.load(folder, *words)
    made = folders.run_of(settings)
    tokenizer = load_prepared_data(settings).tokenizer
    copy_generation_config(settings.init.source, settings, tokenizer, print)
    return made


def facts(folder: Path) -> dict[str, Any]:
    """What transformers makes of a folder's tokenizer."""
    theirs: Any = AutoTokenizer.from_pretrained(folder)
    talk = theirs.apply_chat_template(TALK, tokenize=False)
    return {
        "tokens": theirs.special_tokens_map,
        "more": sorted(theirs.all_special_ids),
        "sides": (theirs.padding_side, theirs.truncation_side),
        "template": theirs.chat_template,
        "talk": talk,
        "ids": theirs(talk, add_special_tokens=False)["input_ids"],
        "length": theirs.model_max_length,
    }


@pytest.mark.parametrize("template_file", [False, True])
def test_a_continued_chat_model_keeps_what_came_with_it(tmp_path: Path, template_file: bool, believed: None):
    chat = tmp_path / "chat"
    ids = folders.chat(chat, template_file=template_file, model_max_length=64)
    first = export.export_model(str(continued(tmp_path, chat)), tmp_path / "first", say=lambda line: None)
    again = export.export_model(str(first), tmp_path / "again", say=lambda line: None)
    assert facts(first) == facts(chat) == facts(again)
    assert facts(chat)["talk"].startswith("<|begin|><|user|>user: Who is king?<|turn|>")
    about = read(first / "generation_config.json")
    assert about["eos_token_id"] == [ids[folders.SEPARATOR], ids["<|turn|>"]]
    assert (about["bos_token_id"], about["pad_token_id"]) == (ids["<|begin|>"], ids["<|turn|>"])
    assert (about["repetition_penalty"], about["min_p"]) == (1.1, 0.05)
    assert (about["temperature"], about["max_new_tokens"]) == (0.8, 8), "what the recipe says goes first"
    rows = range(load_trained_model(str(first)).tokenizer.num_ids, 330)
    assert about["suppress_tokens"] == list(rows), "rows of the table without a token, and no special token"
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (first / name).read_bytes() == (again / name).read_bytes(), name
    everything = "".join(p.read_text() for p in first.rglob("*") if p.suffix in (".json", ".md", ".jinja"))
    assert "somebody" not in everything, "no path of the machine before"


def test_the_end_of_a_turn_stays_the_eos_token_that_a_template_spells(tmp_path: Path, believed: None):
    """As in SmolLM2-Instruct: eos_token ends a turn, the separator a document, and no other file names either."""
    template = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    ids = folders.chat(tmp_path / "chat", eos_token="<|turn|>", chat_template=template)
    (tmp_path / "chat" / "generation_config.json").unlink()
    told: list[str] = []
    first = export.export_model(str(continued(tmp_path, tmp_path / "chat")), tmp_path / "first", say=told.append)
    again = export.export_model(str(first), tmp_path / "again", say=told.append)
    line = "documents ended with <|endoftext|> in training; eos_token stays <|turn|>, as it came"
    assert told[1::2] == [line, line]
    assert facts(first)["talk"] == facts(again)["talk"] == "Who is king?<|turn|>Nobody.<|turn|>"
    for folder in (first, again):
        loaded = load_trained_model(str(folder))
        assert (loaded.tokenizer.separator, loaded.stop_ids) == (folders.SEPARATOR, [0, ids["<|turn|>"]])
    assert (first / "generation_config.json").read_bytes() == (again / "generation_config.json").read_bytes()


@pytest.mark.parametrize("bos_token", ["<|begin|>", None])
def test_weights_from_scratch_know_no_beginning_but_the_separator(
    tmp_path: Path, believed: None, bos_token: str | None
):
    """Nor does whoever asks the export's tokenizer what begins a text: bos_token, or eos_token if it has none."""
    ids = folders.chat(tmp_path / "chat", bos_token=bos_token, eos_token="<|turn|>")
    words = (*SHAPE, f"tokenizer.name={tmp_path / 'chat'}", "tokenizer.vocab_size=null")
    scratch = folders.run_of(tiny.load(tmp_path / "a", *words))
    told: list[str] = []
    out = export.export_model(str(scratch), tmp_path / "out", say=told.append)
    assert told[1] == f"documents began behind {folders.SEPARATOR} in training, so it is the bos_token"
    separator = ids[folders.SEPARATOR]
    assert (
        read(out / "config.json")["bos_token_id"] == read(out / "generation_config.json")["bos_token_id"] == separator
    )
    theirs: Any = AutoTokenizer.from_pretrained(out)
    assert (theirs.bos_token_id, theirs.eos_token) == (separator, "<|turn|>")
    assert theirs("a king")["input_ids"] == load_trained_model(str(scratch)).tokenizer.encode("a king")
    again = export.export_model(str(out), tmp_path / "again", say=lambda line: None)
    assert facts(out) == facts(again)
    taken = export.export_model(str(continued(tmp_path / "b", out)), tmp_path / "taken", say=lambda line: None)
    assert read(taken / "config.json")["bos_token_id"] == separator


def test_the_beginning_that_weights_were_trained_with_is_kept_over_several_runs(tmp_path: Path, believed: None):
    ids = folders.chat(tmp_path / "chat")
    (tmp_path / "chat" / "generation_config.json").unlink()  # only the tokenizer's files say it
    first = continued(tmp_path / "a", tmp_path / "chat")
    settings = tiny.load(tmp_path / "b", *SHAPE, f"init.from={first}", f"tokenizer.name={tmp_path / 'chat'}",
                         "tokenizer.vocab_size=null")  # fmt: skip
    second = folders.run_of(settings)
    copy_generation_config(settings.init.source, settings, load_prepared_data(settings).tokenizer, print)
    out = export.export_model(str(second), tmp_path / "out", say=lambda line: None)
    assert read(out / "config.json")["bos_token_id"] == read(out / "generation_config.json")["bos_token_id"]
    assert read(out / "config.json")["bos_token_id"] == ids["<|begin|>"] != ids[folders.SEPARATOR]
    theirs: Any = AutoTokenizer.from_pretrained(out)
    assert theirs.bos_token == "<|begin|>"


def test_text_has_the_ids_it_was_trained_with(tmp_path: Path, believed: None):
    folders.chat(tmp_path / "chat")
    trained = export.export_model(str(continued(tmp_path, tmp_path / "chat")), tmp_path / "out", say=lambda line: None)
    converted = export.export_model(str(tmp_path / "chat"), tmp_path / "plain", say=lambda line: None)
    before, after, plain = (AutoTokenizer.from_pretrained(f) for f in (tmp_path / "chat", trained, converted))
    assert before("a king")["input_ids"] == plain("a king")["input_ids"], "nothing was trained, nothing is changed"
    assert before("a king")["input_ids"] == [before.bos_token_id, *after("a king")["input_ids"]]
    assert list(after("a king")) == ["input_ids", "attention_mask"]


def test_what_the_recipe_leaves_at_its_default_stays_as_it_came(tmp_path: Path, believed: None):
    folders.chat(tmp_path / "chat")
    words = ("generation.temperature=1", "generation.top_k=0", "generation.top_p=1", "generation.max_tokens=100")
    made = continued(tmp_path, tmp_path / "chat", *words)
    about = read(export.export_model(str(made), tmp_path / "out", say=lambda line: None) / "generation_config.json")
    assert {key: about[key] for key in folders.CHAT_GENERATION} == folders.CHAT_GENERATION
    assert not {"max_new_tokens", "top_k", "top_p", "transformers_version"} & about.keys()


def test_a_greedy_recipe_is_a_greedy_export(tmp_path: Path, believed: None):
    made = folders.run(tmp_path, "generation.temperature=0")
    out = export.export_model(str(made), tmp_path / "out", say=lambda line: None)
    about = read(out / "generation_config.json")
    assert about["do_sample"] is False
    assert not {"temperature", "top_k", "top_p"} & about.keys(), "transformers warns of what it does not use"
    assert (
        load_trained_model(str(out)).generation.temperature,
        load_trained_model(str(out)).generation.max_tokens,
    ) == (0, 8)


@pytest.mark.parametrize("word", [folders.SEPARATOR, "<|turn|>"])
def test_text_ends_at_either_end_here_and_in_transformers(tmp_path: Path, word: str, believed: None):
    """Of a head of zeros but for two rows, one is an end and the other its opposite: one of them scores highest."""
    ids = folders.chat(tmp_path / "chat")
    made = continued(tmp_path, tmp_path / "chat", "model.tie_word_embeddings=false")
    out = export.export_model(str(made), tmp_path / "out", say=lambda line: None)
    ours, theirs = (
        load_trained_model(str(made)),
        cast(Any, AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)),
    )
    for head in (cast(Any, ours.model).lm_head, theirs.lm_head):
        with torch.no_grad():
            head.weight.zero_()
            head.weight[ids[word]] = 1e-3 * torch.ones(32)
            head.weight[65] = -1e-3 * torch.ones(32)
    prompt = [70, 71, 72]
    written = list(ours.generate_ids(prompt, ours.generation, greedy=True))
    settings = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None, "min_p": None}
    answer = theirs.generate(torch.tensor([prompt]), **settings, repetition_penalty=1.0)[0].tolist()
    assert len(written) < 8, "it ended before its length"
    assert answer[len(prompt) :] == [*written, ids[word]]


def test_a_special_token_may_be_drawn_and_is_not_told(tmp_path: Path):
    ids = folders.chat(tmp_path / "chat")
    loaded = load_trained_model(str(tmp_path / "chat"))
    assert loaded.stop_ids == [ids[folders.SEPARATOR], ids["<|turn|>"]]
    assert ids["<|tool|>"] not in loaded.tokenizer.unused_ids(330)
    assert loaded.tokenizer.decode([ids["<|tool|>"], *loaded.tokenizer.encode("a")]) == "a"


def test_what_its_authors_suppress_is_not_drawn(tmp_path: Path, believed: None):
    folders.chat(tmp_path / "chat")
    file = tmp_path / "chat" / "generation_config.json"
    file.write_text(json.dumps(read(file) | {"suppress_tokens": [7, 5, 10**9, "x"]}))
    loaded = load_trained_model(str(tmp_path / "chat"))
    rows = list(range(loaded.tokenizer.num_ids, 330))
    assert loaded.banned_ids == [5, 7, *rows]
    out = export.export_model(str(tmp_path / "chat"), tmp_path / "out", say=lambda line: None)
    assert read(out / "generation_config.json")["suppress_tokens"] == [5, 7, *rows]


def test_what_our_own_sampling_does_not_do_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folders.chat(tmp_path / "chat")
    generate_command(str(tmp_path / "chat"), max_tokens=1)
    frame, line = capsys.readouterr().err.splitlines()
    assert "its tokenizer adds <|begin|> to a text" in frame
    assert line == "generation_config.json asks for more than is done here: repetition_penalty=1.1, min_p=0.05"
    assert (
        unsupported_generation_settings({"num_beams": 1, "repetition_penalty": 1.0, "eos_token_id": 3, "top_k": 9})
        == []
    )


def test_weights_of_a_run_bring_what_it_had(tmp_path: Path):
    ids = folders.chat(tmp_path / "chat")
    first = continued(tmp_path, tmp_path / "chat")
    second = continued(tmp_path, first, "run.name=second", f"tokenizer.name={first / 'tokenizer'}")
    assert load_trained_model(str(second)).stop_ids == [ids[folders.SEPARATOR], ids["<|turn|>"]]
    assert load_trained_model(str(second)).inherited_generation["repetition_penalty"] == 1.1
    assert (
        load_trained_model(str(second)).tokenizer.companions.tokenizer_config["chat_template"] == folders.CHAT_TEMPLATE
    )


def test_other_weights_bring_nothing(tmp_path: Path):
    folders.chat(tmp_path / "chat")
    made = continued(tmp_path, tmp_path / "chat")
    settings, told = read_run_config(made / "config.yaml"), []
    kept = made / "tokenizer" / "generation_config.json"
    assert kept.is_file()
    folders.hub(tmp_path / "base", folders.CHAT_SHAPE)
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": 5}')
    tokenizer = load_prepared_data(settings).tokenizer
    copy_generation_config(str(tmp_path / "base"), settings, tokenizer, told.append)
    assert "left out: its token ids are those of another tokenizer" in told[0]
    assert not kept.exists(), "nor does that of a start before stay"


def test_pad_of_the_recipe_goes_before_theirs(tmp_path: Path, believed: None):
    folders.chat(tmp_path / "chat")
    made = continued(tmp_path, tmp_path / "chat", "tokenizer.pad=<|pad|>")
    out = export.export_model(str(made), tmp_path / "out", say=lambda line: None)
    theirs: Any = AutoTokenizer.from_pretrained(out)
    assert theirs.pad_token == "<|pad|>"
    assert read(out / "generation_config.json")["pad_token_id"] == theirs.pad_token_id


def test_roles_of_the_older_map_and_the_newer_list(tmp_path: Path):
    folders.chat(tmp_path / "chat", extra_special_tokens=["<|user|>", "<|tool|>"])
    about = read(tmp_path / "chat" / "tokenizer_config.json")
    del about["additional_special_tokens"], about["bos_token"]
    (tmp_path / "chat" / "tokenizer_config.json").write_text(json.dumps(about))
    (tmp_path / "chat" / "special_tokens_map.json").write_text(
        '{"bos_token": {"content": "<|begin|>"}, "pad_token": "<|no|>"}'
    )
    beside = read_companions(tmp_path / "chat")
    assert (beside.token_for_role("bos_token"), beside.token_for_role("pad_token")) == ("<|begin|>", "<|turn|>")
    assert beside.tokenizer_config["additional_special_tokens"] == ["<|user|>", "<|tool|>"], (
        "as transformers 4 reads it"
    )
    assert beside.special_tokens == {"<|begin|>", folders.SEPARATOR, "<|turn|>", "<|user|>", "<|tool|>"}


def test_a_token_with_a_role_is_special_whatever_tokenizer_json_says(tmp_path: Path):
    folders.tokenizer().save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace('"special": true', '"special": false'))
    again = Tokenizer.from_folder(tmp_path, folders.SEPARATOR)
    assert again.special_ids == {0}
    assert 0 not in again.encode(f"a{folders.SEPARATOR}b")
    by_id = Tokenizer.from_folder(tmp_path, 0)
    assert by_id.separator == folders.SEPARATOR
    with pytest.raises(UserError, match="the end of a text has no token: saw id 9999"):
        Tokenizer.from_folder(tmp_path, 9999)


@pytest.mark.slow
def test_a_chat_model_that_was_trained_on(tmp_path: Path):
    ids = folders.chat(tmp_path / "chat", template_file=True, model_max_length=64)
    words = (*SHAPE, f"init.from={tmp_path / 'chat'}", f"tokenizer.name={tmp_path / 'chat'}")
    steps = ("run.stop_after=main", "phases.main.steps=2", "phases.main.warmup_steps=0", "evaluate.every=0")
    done = tiny.train(tmp_path, *words, "tokenizer.vocab_size=null", *steps)
    assert done.returncode == 0, done.stderr
    out = export.export_model(str(tmp_path / "runs" / "quickstart"), tmp_path / "out", say=lambda line: None)
    shutil.rmtree(tmp_path / "chat" / "additional_chat_templates")
    assert facts(out)["talk"]
    assert read(out / "generation_config.json")["eos_token_id"] == [ids[folders.SEPARATOR], ids["<|turn|>"]]
    assert (out / "additional_chat_templates" / "tool_use.jinja").read_text().startswith("TOOLS ")
    loaded: LoadedModel = load_trained_model(str(out))
    assert loaded.inherited_generation["repetition_penalty"] == 1.1
