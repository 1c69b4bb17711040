"""A secret in a URL is for its server: it stands in no file, on no console, and opens nothing a second time."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from smoltrain.config.load import config_to_yaml, load_config, read_run_config
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.errors import Problem, TrainingStopped, UserError, format_value
from smoltrain.redact import REDACTED, is_redacted, redact_text, redact_tree, redact_url
from smoltrain.run.run_folder import make_run_record
from tests import tiny
from tests.data.documents.files import list_shards
from tests.data.tokens import test_prepare
from tests.faulty_server import FaultyServer
from tests.tiny import enter_run_folder

SECRET = "Zx9SeCrEt7"
AMZ = f"X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIA1/{SECRET}&X-Amz-Date=2026&X-Amz-Signature={SECRET}"
GOOGLE = f"X-Goog-Credential=a%40b&X-Goog-Expires=9&X-Goog-Signature={SECRET}"
SAS = f"sv=2024-01-01&st=2026&se=2027&sr=b&sp=r&sig={SECRET}%3D"
CLOUDFRONT = f"Expires=17&Policy=e30_&Key-Pair-Id=K2&Signature={SECRET}"
QUERIES = (
    AMZ, GOOGLE, SAS, CLOUDFRONT, f"token={SECRET}", f"access_token={SECRET}", f"apiKey={SECRET}", f"key={SECRET}",
    f"api-key={SECRET}", f"client_secret={SECRET}", f"password={SECRET}", f"pwd={SECRET}", f"auth={SECRET}",
    f"X%2DAmz%2DSignature={SECRET}", f"Signature={SECRET}", f"jwt={SECRET}", f"session_id={SECRET}", f"hf_{SECRET}",
    f"q-signature={SECRET}&q-ak=1", f"x=eyJhbGciOiJ9.{SECRET}", f"a=1;token={SECRET}", f"a=1&amp;sig={SECRET}",
)  # fmt: skip
USERS = (SECRET, f"me:{SECRET}", f":{SECRET}", f"me:a@{SECRET}", f"me:a/{SECRET}", f"me:a#{SECRET}", f"me:a?b={SECRET}")


# ---- one URL


@pytest.mark.parametrize("query", QUERIES)
def test_no_secret_of_a_query_stays_and_the_file_can_still_be_told(query: str):
    for before, kept in (("", ""), ("version=3&", "version=3&"), ("id=9&page=2&", "id=9&page=2&")):
        found = redact_url(f"https://host.example/data/a.jsonl?{before}{query}")
        assert SECRET not in found
        assert found.startswith(f"https://host.example/data/a.jsonl?{kept}")
        assert found.endswith(REDACTED)
        assert is_redacted(found)
        assert redact_url(found) == found
    assert SECRET not in redact_url(f"https://host.example/a.jsonl#{query}")


@pytest.mark.parametrize("user", USERS)
def test_no_user_stays(user: str):
    for scheme in ("https", "s3", "ftp", "webdav+https"):
        found = redact_url(f"{scheme}://{user}@host.example:8443/a.jsonl")
        assert found == f"{scheme}://{REDACTED}@host.example:8443/a.jsonl"
        assert is_redacted(found)


@pytest.mark.parametrize(
    "plain",
    [
        "https://host/a.parquet?version=3&author=me&keyword=x&sort=key&design=1&page=2&se=5",
        "hf://datasets/owner/name@c0ffee/train.parquet", "abfs://container@account.dfs.core.windows.net/a",
        "s3://bucket/@me/a.jsonl", "https://[::1]:80/a@b", "/a/b?token=1", "a:b@c", "", "https://", "https://h?#",
    ],
)  # fmt: skip
def test_what_holds_no_secret_is_left(plain: str):
    assert redact_url(plain) == redact_text(plain) == plain
    assert not is_redacted(plain)


def test_a_url_that_is_signed_anew_reads_the_same():
    one = redact_url(f"https://h/a?{AMZ}")
    longer = ("&X-Amz-Date", "&X-Amz-Security-Token=5&X-Amz-Date")
    for change in (("2026", "2031"), (SECRET, "other"), ("AKIA1", "ASIA2"), longer):
        assert redact_url(f"https://h/a?{AMZ.replace(*change)}") == one


def test_urls_are_found_in_any_text():
    url = f"https://me:{SECRET}@host/a.jsonl?token={SECRET}"
    for words in (f"saw {url}, want", f"saw '{url}'", f'"{url}"', f"({url})", f"<{url}>", f"{url}\n{url}", f"x::{url}"):
        assert SECRET not in redact_text(words)
    assert redact_tree({"a": [url, {"b": (url, 5, None)}]}) == {
        "a": [redact_url(url), {"b": (redact_url(url), 5, None)}]
    }


def test_errors_hold_none():
    url = f"https://me:{SECRET}@host/a.jsonl?token={SECRET}"
    problem = Problem(url, url, url, url)
    for words in (str(problem), str(UserError(problem)), str(TrainingStopped(f"no {url}"))):
        assert SECRET not in words
    for length in range(len(url)):  # nor is any left over where a message is cut
        assert SECRET[:4] not in format_value(" " * length + url)


# ---- a run whose data lie behind such a URL


@pytest.fixture
def served(tmp_path: Path):
    lines = "".join(json.dumps({"text": f"This is document number {i}. " * 4}) + "\n" for i in range(120))
    test_prepare.twelve(tmp_path)
    with FaultyServer({"a.jsonl": ("{broken\n" + lines).encode()}) as server:
        yield server


def one_line(text: str) -> bytes:
    return (json.dumps({"text": f"A line of {text} with some words in it. " * 4}) + "\n").encode()


def url_of(server: FaultyServer, name: str = "a.jsonl", **replace: str) -> str:
    query = AMZ.replace("2026", replace.get("date", "2026")).replace(SECRET, replace.get("secret", SECRET))
    return server.url(f"{name}?version=3&{query}").replace("http://", f"http://me:{SECRET}@")


def leaks(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


@pytest.mark.parametrize("mode", ["stream", "cached"])
def test_no_file_of_the_data_holds_the_secret_and_a_new_signature_is_no_change(
    tmp_path: Path, served: FaultyServer, mode: str, capsys: pytest.CaptureFixture[str]
):
    changes: dict[str, Any] = {"data__cache": tmp_path / "cache"} if mode == "cached" else {}
    settings = test_prepare.config(tmp_path, mode, data__path=url_of(served), **changes)
    first = prepare_run_data(settings)
    enter_run_folder(settings, 1, 0)
    assert leaks(tmp_path) == []
    assert (settings.run_folder / "config.yaml").read_text().count(REDACTED) >= 1
    assert next(tmp_path.rglob("bad-records.jsonl")).read_text().count(REDACTED) >= 1
    anew = test_prepare.config(tmp_path, mode, data__path=url_of(served, date="2031", secret="another"), **changes)
    again = prepare_run_data(anew)
    assert again.index.fingerprint == first.index.fingerprint
    assert make_run_record(anew, 1, 0).provenance["starts"][-1]["changes"] == []
    if mode == "stream":
        ((shard,),) = again.shards
        assert shard.url == url_of(served, date="2031", secret="another"), "it can be opened"
    assert SECRET not in capsys.readouterr().out


def test_a_gone_file_does_not_tell_its_secret(tmp_path: Path, served: FaultyServer):
    with pytest.raises(UserError, match="the data are missing") as caught:
        prepare_run_data(test_prepare.config(tmp_path, "stream", data__path=url_of(served, "gone.jsonl")))
    assert SECRET not in str(caught.value)


def test_the_own_config_of_a_run_asks_for_the_url_again(
    tmp_path: Path, served: FaultyServer, capsys: pytest.CaptureFixture[str]
):
    for mode in ("stream", "cached"):
        settings = test_prepare.config(tmp_path, mode, data__path=url_of(served), run__name=mode)
        prepare_run_data(settings)
        enter_run_folder(settings, 1, 0)
        own = str(settings.run_folder / "config.yaml")
        if mode == "stream":
            with pytest.raises(UserError) as caught:
                prepare_run_data(load_config(own))
            assert "the secret that was taken out" in str(caught.value)
            assert str(caught.value).endswith("change data.path on the command line")
        else:
            prepare_run_data(load_config(own))
            assert "the tokens that were made of it stay in use" in capsys.readouterr().out
        assert prepare_run_data(load_config(own, [f"data.path={url_of(served)}"])).mode == mode


def test_held_out_files_and_mixed_sources_too(tmp_path: Path, served: FaultyServer):
    served.files |= {f"{name}.jsonl": one_line(name) * 60 for name in ("held-a", "b", "held-b")}
    parts: list[dict[str, Any]] = [
        {"name": n, "path": url_of(served, f"{n}.jsonl"), "validation_path": url_of(served, f"held-{n}.jsonl")}
        for n in ("a", "b")
    ]
    parts = [part | {"weight": 1.0} for part in parts]
    settings = test_prepare.config(tmp_path, "stream", data__path=None, data__sources=parts)
    prepare_run_data(settings)
    enter_run_folder(settings, 1, 0)
    assert leaks(tmp_path) == []
    anew = json.loads(json.dumps(parts).replace("X-Amz-Date=2026", "X-Amz-Date=2031"))
    assert anew != parts
    assert make_run_record(test_prepare.config(tmp_path, "stream", data__path=None, data__sources=anew), 1, 0)
    own = yaml.safe_load((settings.run_folder / "config.yaml").read_text())
    with pytest.raises(UserError, match=r"change data\.sources\.a\.path on the command line"):
        list_shards(read_run_config(settings.run_folder / "config.yaml").data.parts[0], key="data.sources.a")
    assert own["data"]["sources"][1]["validation_path"].endswith(f"?version=3&{REDACTED}")


def test_show_prints_none(tmp_path: Path):
    shown = config_to_yaml(tiny.load(tmp_path, f"data.path=https://me:{SECRET}@host/a.jsonl?{AMZ}"))
    assert SECRET not in shown
    assert f"path: https://{REDACTED}@host/a.jsonl?{REDACTED}" in shown


@pytest.mark.slow
def test_nothing_of_a_whole_run_holds_it(tmp_path: Path, served: FaultyServer):
    """Files, W&B's offline ones too, and console: of a run that streams, ends, and is refused from its own config."""
    words = (f"data.path={url_of(served)}", "track.wandb=offline", "data.mode=stream", "evaluate.rows=2")
    done = tiny.train(tmp_path, *words, "data.validation_share=0.3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(tmp_path.rglob("*.wandb"))
    assert SECRET not in done.stdout + done.stderr
    assert leaks(tmp_path) == []
    served.files.clear()
    lost = tiny.train(tmp_path, *words, "data.validation_share=0.3", "phases.continuation.steps=6")
    assert lost.returncode == 2
    assert SECRET not in lost.stdout + lost.stderr
    assert leaks(tmp_path) == []
