"""What a recipe reads from elsewhere: servers that answer, refuse, or say nothing; and who is not asked."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from smoltrain.data.documents import hub as hub_module
from smoltrain.doctor import reach
from smoltrain.doctor.check import Check, run_check
from tests import tiny
from tests.hub import Hub
from tests.wandb_server import WandbServer


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server that takes a connection and never says a word."""
    monkeypatch.setattr(reach, "ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_server_that_says_nothing_is_not_waited_for(silent: str) -> None:
    began = time.monotonic()
    assert reach.ask_server(silent) == "timed out"
    assert time.monotonic() - began < 60, "its limit is a fifth of a second"


def test_a_server_that_refuses_has_answered() -> None:
    with Hub([]) as hub:
        assert reach.ask_server(f"{hub.url}/nothing-here") is None
    refused = reach.ask_server(hub.url)
    assert refused is not None
    assert "refused" in refused


def test_nobody_is_asked_whom_the_recipe_does_not_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "ask_server", None)
    config = tiny.load(tmp_path)
    assert reach.check_hub(config).saw == "not asked: the recipe takes nothing from it"
    assert reach.check_wandb(config).saw == "not asked: off, as track.wandb asks"
    offline = tiny.load(tmp_path, "tokenizer=HuggingFaceTB/cosmo2-tokenizer", "tokenizer.vocab_size=null")
    assert reach.check_hub(offline).saw.startswith("not asked: HF_HUB_OFFLINE is set, tokenizer HuggingFaceTB/cosmo2-")


def test_the_hub_is_asked_where_the_recipe_would(silent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "is_hub_offline", lambda: False)
    monkeypatch.setattr(hub_module, "HUB_ENDPOINT", silent)
    config = tiny.load(tmp_path, "data.path=null", "data.hub=owner/texts")
    found = reach.check_hub(config)
    assert (found.status, found.saw) == ("fault", f"{silent} does not answer, for data owner/texts: timed out")
    with Hub([]) as hub:
        monkeypatch.setattr(hub_module, "HUB_ENDPOINT", hub.url)
        assert reach.check_hub(config).status == "ok"
        assert hub.asked == ["HEAD /"], "no name was sent"


def test_wandb_is_asked_where_the_settings_would(silent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.forget_wandb(tmp_path, monkeypatch)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", silent)
    config = tiny.load(tmp_path, "track.wandb=auto")
    found = reach.check_wandb(config)
    assert (found.status, found.saw) == ("warning", f"{silent} does not answer: timed out; a run would log offline")
    with WandbServer() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        assert reach.check_wandb(config).status == "ok"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("data.path=/no/such/folder",), "the data are missing: /no/such/folder"),
        (("data.package=no_such_package", "data.path=null"), "the data's package is not installed: 'no_such_package'"),
    ],
)
def test_data_that_cannot_be_read_are_a_fault(overrides: tuple[str, ...], said: str, tmp_path: Path) -> None:
    config = tiny.load(tmp_path, *overrides)
    found = run_check(Check("data", lambda: reach.check_data(config)))
    assert (found.status, found.saw) == ("fault", said)


def test_data_are_read_and_not_only_listed(tmp_path: Path) -> None:
    assert reach.check_data(tiny.load(tmp_path)).saw.startswith("11 files, 0.")
    (tmp_path / "bad.jsonl").write_text('{"text": 7}\n')
    found = reach.check_data(tiny.load(tmp_path, f"data.path={tmp_path / 'bad.jsonl'}"))
    assert found.status == "warning"
    assert found.saw.startswith(f"the first record of {tmp_path / 'bad.jsonl'} cannot be read: ")
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 and no more")
    config = tiny.load(tmp_path, f"data.path={broken}")
    assert run_check(Check("data", lambda: reach.check_data(config))).status == "fault"


def test_tokenizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reach.check_tokenizer(tiny.load(tmp_path)).saw == "bpe, to be trained on the data"
    monkeypatch.setenv("SMOLTRAIN_CACHE", str(tmp_path / "cache"))
    packaged = tiny.load(tmp_path, "tokenizer=gpt2", "tokenizer.vocab_size=null", "model.vocab_size=50257")
    found = reach.check_tokenizer(packaged)
    assert (found.status, found.advice.partition(",")[0]) == ("warning", "`smoltrain prepare tokenizer gpt2`")
    missing = tiny.load(tmp_path, "tokenizer=/no/such/folder", "tokenizer.vocab_size=null")
    found = run_check(Check("tokenizer", lambda: reach.check_tokenizer(missing)))
    assert found.status == "fault"
    assert "/no/such/folder" in found.saw
