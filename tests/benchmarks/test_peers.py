"""Other trainers: their shapes, environments and commands."""

from pathlib import Path

import pytest

from benchmarks import peers
from smoltrain.config.load import load_config


@pytest.mark.parametrize(
    ("recipe", "words", "model_type"),
    [
        ("smollm2-135m", [], "llama"),
        ("shakespeare-80m", [], "gpt2"),
        ("quickstart", ["model.mlp=gelu"], None),
        ("smollm2-135m-hf", [], "llama"),
    ],
)
def test_a_shape_in_the_words_of_peers(recipe: str, words: list[str], model_type: str | None):
    section = load_config(recipe, words).model
    if model_type is None:
        with pytest.raises(peers.PeerUnavailable, match="no class of this shape"):
            peers.describe_peer_model(peers.PEERS["plain"], section)
    else:
        assert peers.describe_peer_model(peers.PEERS["plain"], section)["model"]["model_type"] == model_type
    if recipe == "smollm2-135m-hf":
        with pytest.raises(peers.PeerUnavailable, match="its GPT"):
            peers.describe_peer_model(peers.PEERS["litgpt"], section)


# What `python -m venv FOLDER`, `python -m pip install ...` and `python -m pip list` do; pip may fail.
PYTHON = """#!/bin/sh
echo "$*" >> "$CALLS"
case "$*" in
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    *" install "*missing*) echo "Looking around" >&2; echo "ERROR: no matching distribution" >&2; exit 1 ;;
    *" list "*) echo '[{"name": "torch", "version": "2.13.0"}]' ;;
esac
"""


@pytest.fixture
def installer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for Python; the file of the calls it got."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(PYTHON)
    python.chmod(0o755)
    monkeypatch.setattr(peers.sys, "executable", str(python))
    monkeypatch.setenv("CALLS", str(calls))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return calls


def test_an_environment_is_made_once_and_named_after_what_is_in_it(
    installer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = peers.install_peer_environment("litgpt")
    assert folder.parent == tmp_path / "cache" / "smoltrain"
    assert (
        f"installs {', '.join(peers.ENVIRONMENTS['litgpt'])} and what they need into {folder}"
        in capsys.readouterr().out
    )
    calls = installer.read_text().splitlines()
    assert calls[1].endswith(" ".join(("install --quiet", *peers.ENVIRONMENTS["litgpt"])))
    assert peers.install_peer_environment("litgpt") == folder
    assert peers.read_peer_versions("litgpt") == {"torch": "2.13.0"}
    assert installer.read_text().splitlines() == calls
    (folder / peers.INSTALLED_FILE).unlink()  # cut short
    assert peers.install_peer_environment("litgpt") == folder
    assert len(installer.read_text().splitlines()) == 2 * len(calls)
    assert peers.install_peer_environment("transformers") != folder


def test_a_peer_that_cannot_be_had_is_told_in_a_line(installer: Path, monkeypatch: pytest.MonkeyPatch):
    litgpt = peers.PEERS["litgpt"]
    with pytest.raises(peers.PeerUnavailable, match="one rank"):
        peers.build_peer_command(litgpt, Path("task.json"), 2, 0)
    assert not installer.exists()
    monkeypatch.setattr(peers, "ENVIRONMENTS", {"litgpt": ("missing==1",)})
    with pytest.raises(peers.PeerUnavailable, match=r"^it cannot be installed: ERROR: no matching distribution$"):
        peers.build_peer_command(litgpt, Path("task.json"), 1, 0)


def test_no_lock_of_an_ended_build_is_left_to_wait_for(installer: Path):
    folder = Path(peers.peer_variables(peers.PEERS["hf-trainer+ds"])["TORCH_EXTENSIONS_DIR"])
    lock = folder / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert peers.peer_variables(peers.PEERS["hf-trainer+ds"]) == {"TORCH_EXTENSIONS_DIR": str(folder)}
    assert lock.parent.is_dir()
    assert not lock.exists()


def test_ranks_and_deepspeed_need_a_launcher(installer: Path):
    alone = peers.build_peer_command(peers.PEERS["hf-trainer"], Path("task.json"), 1, 5)
    assert alone[1:] == [str(peers.HERE / "hf_trainer.py"), "task.json"]
    launched = peers.build_peer_command(peers.PEERS["hf-trainer+ds"], Path("task.json"), 2, 5)
    assert [Path(word).name for word in launched] == [
        "torchrun", "--nproc-per-node=2", "--master-port=5", "hf_trainer.py", "task.json", "--deepspeed",
    ]  # fmt: skip
    assert all(Path(peers.HERE, peer.script).is_file() for peer in peers.PEERS.values())
