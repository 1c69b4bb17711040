"""What push sends to the Hub is the verified export, byte for byte; what can go wrong on the way is one line."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from smoltrain.config.schema import ModelSection
from smoltrain.errors import BAD_INPUT, DONE, UserError
from smoltrain.evaluation.results import evaluation_file
from smoltrain.export import export
from smoltrain.export.push import NETWORK_LIBRARIES, _as_user_errors, _find_or_make_export, _read_hub_settings
from smoltrain.export.verify import ExportComparison
from smoltrain.inference.find_run import EXPORT_MARKER_FILE
from smoltrain.inference.load import load_trained_model
from tests import folders
from tests.hub_uploads import TOKEN, Hub, serve

# As cli.main ends a verb; a process of its own, because the client reads its settings when it is imported.
VERB = """
import sys
from smoltrain.errors import BAD_INPUT, UserError, format_error
from smoltrain.export.push import push_to_hub
try:
    print(push_to_hub(sys.argv[1], sys.argv[2], private=sys.argv[3] == "private"))
    print("with torch" if "torch" in sys.modules else "without torch")
except UserError as error:
    print(format_error(error), file=sys.stderr)
    sys.exit(BAD_INPUT)
"""
Push = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose newest checkpoint is exported. (What verifies an export is tested in test_export.py.)"""
    made = folders.run(tmp_path_factory.mktemp("push"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "verify_export", lambda loaded, folder: ExportComparison("LlamaForCausalLM", 1, 0.0))
        export.export_model(str(made), say=lambda line: None)
    return made


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub, server = serve()
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def push(hub: Hub, tmp_path: Path) -> Push:
    """push(RUN, REPO) in a process that knows the server and the token, and nothing else of a Hub."""

    def push(source: Path, repo: str, private: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
        own = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        own |= {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
        own |= {"HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"} | environment
        words = [sys.executable, "-c", VERB, str(source), repo, "private" if private else "public"]
        return subprocess.run(words, capture_output=True, text=True, check=False, env=own, timeout=120)

    return push


def test_every_byte_arrives(run: Path, hub: Hub, push: Push):
    folder = run / "export" / "step-00000012"
    done = push(run, "me/tiny")
    assert (done.returncode, done.stderr) == (DONE, "")
    assert done.stdout == f"export {folder} is verified already\n{hub.url}/me/tiny\nwithout torch\n"
    assert hub.repos == {"me/tiny": {p.name: p.read_bytes() for p in folder.iterdir()}}
    assert len(hub.repos["me/tiny"]["model.safetensors"]) > 50_000
    assert set(hub.objects.values()) == {
        (folder / name).read_bytes() for name in ("model.safetensors", "tokenizer.json")
    }
    assert hub.private == {"me/tiny": True}
    assert hub.messages == ["quickstart, step 12 of 12, by smoltrain 0.1.0"]

    again = push(folder, "me/tiny", private=False)  # an export itself, a repository that is there
    assert again.returncode == DONE, again.stderr
    assert again.stdout == f"{hub.url}/me/tiny\nwithout torch\n"
    assert len(hub.messages) == 2
    assert sum("PUT /objects/" in request for request in hub.requests) == 2, "what is there is not sent again"


def test_without_a_token(run: Path, hub: Hub, push: Push):
    refused = push(run, "me/tiny", HF_TOKEN="")
    assert (refused.returncode, refused.stdout) == (BAD_INPUT, "")
    assert refused.stderr.startswith("error: there is no token for the Hub: saw none, want a token that may write")
    assert refused.stderr.count("\n") == 1
    assert hub.requests == []


def test_names_and_switches_are_looked_at_first(run: Path, hub: Hub, push: Push):
    refused = push(run, "a/b/c", HF_HUB_OFFLINE="1", HF_TOKEN="")
    assert refused.returncode == BAD_INPUT
    lines = refused.stderr.splitlines()
    assert [line.partition(":")[2].partition(":")[0].strip() for line in lines] == [
        "no repository of the Hub can have this name",
        "there is no token for the Hub",
        "the Hub is switched off",
    ]
    assert "saw 'a/b/c', want OWNER/NAME" in lines[0]
    assert hub.requests == []


def is_taken_by_library(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


NOT_ASCII = pytest.param(
    "me/ö",
    marks=pytest.mark.skipif(is_taken_by_library("me/ö"), reason="an older huggingface_hub leaves it to the Hub"),
)


@pytest.mark.parametrize("name", ["me/tiny.git", "me/a--b", NOT_ASCII, "", "/tiny"])
def test_names_that_the_hub_does_not_take(name: str):
    with pytest.raises(UserError, match="no repository of the Hub can have this name"):
        _read_hub_settings(name)


def test_a_token_that_is_refused(run: Path, hub: Hub, push: Push):
    refused = push(run, "me/tiny", HF_TOKEN="hf_wrong")
    assert refused.returncode == BAD_INPUT
    assert refused.stderr == (
        f"error: the Hub at {hub.url} refuses the token: saw 401 Invalid credentials in Authorization header, "
        "want a token that it knows; change HF_TOKEN, or `hf auth login`\n"
    )


@pytest.mark.parametrize("place", ["organisation", "commit"])
def test_a_place_that_is_closed(run: Path, hub: Hub, push: Push, place: str):
    hub.fails_on = "/commit/" if place == "commit" else ""
    repo = "me/tiny" if place == "commit" else "closed/tiny"
    refused = push(run, repo)
    assert refused.returncode == BAD_INPUT
    assert refused.stderr.startswith(f"error: the Hub at {hub.url} refuses {repo}: saw 403 You don't have the rights")
    assert "want a token that may write there" in refused.stderr
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "kind", ["closed port", pytest.param("silence", marks=pytest.mark.slow), "no such host", "no URL"]
)
def test_a_hub_that_is_not_there(run: Path, push: Push, kind: str):
    with socket.socket() as quiet:
        quiet.bind(("127.0.0.1", 0))
        if kind == "silence":
            quiet.listen()  # takes the connection and never answers
        port = quiet.getsockname()[1]
        url = {"no such host": "http://hub.invalid", "no URL": "hub"}.get(kind, f"http://127.0.0.1:{port}")
        refused = push(run, "me/tiny", HF_ENDPOINT=url)
    assert refused.returncode == BAD_INPUT
    assert refused.stderr.startswith("error: the Hub cannot be reached: saw ")
    assert url in refused.stderr
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize("library", NETWORK_LIBRARIES)
def test_a_connection_that_breaks_is_told_whatever_library_says_it(library: str):
    broken = type("ReadError", (Exception,), {"__module__": f"{library}.errors"})
    with pytest.raises(UserError) as error, _as_user_errors("https://hub", "me/tiny"):
        raise broken("connection reset")
    (problem,) = error.value.problems
    assert (problem.what, problem.saw) == ("the Hub cannot be reached", "connection reset")
    assert problem.want.endswith("the same command tries again")


def test_a_fault_of_ours_is_no_mistake_of_the_user():
    with pytest.raises(ZeroDivisionError), _as_user_errors("https://hub", "me/tiny"):
        _ = 1 / 0


def test_what_is_no_export(run: Path, tmp_path: Path):
    with pytest.raises(UserError, match="no such run"):
        _find_or_make_export(str(tmp_path / "nothing"), print)
    section = load_trained_model(str(run)).model.section
    assert isinstance(section, ModelSection)
    folders.hub(tmp_path / "hub", section)
    with pytest.raises(UserError, match="the folder is no verified export"):
        _find_or_make_export(str(tmp_path / "hub"), print)


def test_a_card_without_what_was_measured_since_is_told(run: Path):
    folder = run / "export" / "step-00000012"
    exported_at = (folder / EXPORT_MARKER_FILE).stat().st_mtime
    file = evaluation_file(run, 12)
    file.parent.mkdir()
    file.write_text("{}")
    told: dict[int, list[str]] = {}
    for later_s in (-5, 5):
        os.utime(file, (exported_at + later_s, exported_at + later_s))
        told[later_s] = []
        assert _find_or_make_export(str(run), told[later_s].append)[0] == folder
    file.unlink()
    assert told[-5] == [f"export {folder} is verified already"]
    assert told[5][1].startswith("its card lacks what was measured of step 12 since: `smoltrain export ")


@pytest.mark.slow
def test_what_is_not_exported_yet_is_exported_first(hub: Hub, push: Push, tmp_path: Path):
    made = folders.run(tmp_path)
    done = push(made, "me/tiny")
    assert done.returncode == DONE, done.stderr
    folder = made / "export" / "step-00000012"
    assert done.stdout.startswith(f"export {folder}: LlamaForCausalLM, 28,832 parameters in bfloat16")
    assert hub.repos == {"me/tiny": {p.name: p.read_bytes() for p in folder.iterdir()}}
    (folder / "model.safetensors").write_bytes(b"changed since")
    done = push(made, "me/tiny")
    assert done.returncode == DONE, done.stderr
    assert "transformers alone gives the same logits" in done.stdout, "a changed export is made anew"
    assert hub.repos["me/tiny"]["model.safetensors"] != b"changed since"
