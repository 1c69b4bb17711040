"""The way of a newcomer, examples/whole_path.sh, from a text to a model on a Hub: each verb says what it did."""

import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest

from smoltrain.cli import PANELS
from smoltrain.errors import DONE
from tests import hub_uploads, preloaded, tiny

SCRIPT = Path(__file__).parents[2] / "examples" / "whole_path.sh"
SAYS = {  # verb -> what it must print, in the order of the script
    "train": r"^done: 12 of 12 steps",
    "runs": r"second[\s\S]*first",  # the newest comes first
    "watch": r"first",
    "summary": r"validation loss",
    "plot": r"loss\.png$",
    "report": r"report\.html$",
    "compare": r"first[\s\S]*second",
    "perplexity": r"perplexity",
    "eval": r"smoltrain_sentences",
    "generate": r"^\*\*ROMEO\*\*",
    "chat": r"^seed 1: the same lines under it get the same answers$[\s\S]*^temperature 0\.5$",
    "export": r"export/step-00000012",
    "push": r"^http://127\.0\.0\.1:\d+/me/first$",
}
PACKAGES = {"eval": "lm_eval"}  # of extras that a test environment need not have


def why_not(verb: str) -> str | None:
    """Why a verb of the script cannot be run here; None for one that can."""
    if not any(verb in verbs for verbs in PANELS.values()):
        return f"smoltrain has no verb {verb} yet"
    package = PACKAGES.get(verb)
    if package and importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    return None


def verb_of(line: str) -> str | None:
    found = re.search(r"(?:^|[;|] (?:then )?)smoltrain (\w+)", line)
    return found[1] if found else None


def test_the_script_has_these_verbs_in_this_order():
    verbs = [verb_of(line) for line in SCRIPT.read_text(encoding="utf-8").splitlines()]
    assert list(dict.fromkeys(filter(None, verbs))) == list(SAYS)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each verb printed; the script is run whole, without the lines of verbs that cannot be run here."""
    folder = tmp_path_factory.mktemp("path")
    lines = SCRIPT.read_text(encoding="utf-8").splitlines()
    script = folder / SCRIPT.name
    script.write_text("\n".join(line for line in lines if not why_not(verb_of(line) or "train")), encoding="utf-8")
    hub, server = hub_uploads.serve()
    foreign = ("HF_", "HUGGING", "WANDB_", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub_uploads.TOKEN, "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HOME": str(folder / "home"), "REPO": "me/first", "PYTHONPATH": str(SCRIPT.parents[1])}
    environment |= {"OMP_NUM_THREADS": "1", "SMOLTRAIN_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
    with preloaded.serve(folder, environment) as programs:
        done = subprocess.run(
            ["bash", "-x", script, *tiny.words(folder)], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, encoding="utf-8", check=False, timeout=240,
            env=environment | {"PATH": f"{programs}:{os.environ['PATH']}"},
        )  # fmt: skip
    server.shutdown()
    server.server_close()
    assert done.returncode == DONE, done.stdout
    assert "Traceback" not in done.stdout
    assert {"model.safetensors", "README.md"} <= hub.repos["me/first"].keys()
    parts = re.split(r"^\+ smoltrain (\w+).*$", done.stdout, flags=re.MULTILINE)  # as bash -x shows each command
    texts: dict[str, str] = {}
    for verb, text in zip(parts[1::2], parts[2::2], strict=True):
        texts[verb] = texts.get(verb, "") + text
    return texts


@pytest.mark.slow
@pytest.mark.parametrize("verb", SAYS)
def test_each_verb_says_what_it_did(said: dict[str, str], verb: str):
    if reason := why_not(verb):
        pytest.skip(reason)
    assert re.search(SAYS[verb], said[verb], re.MULTILINE), said[verb]
