"""Other trainers, each used as its own users would, on the task that a file describes (peer.py).

The scripts beside this file run in environments of their own, which are made when they are first needed; nothing of
smoltrain is imported there.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smoltrain.config.schema import AnyModelSection, ModelSection, TransformersSection
from smoltrain.errors import Problem, UserError, suggest_choice
from smoltrain.model.build import build_model
from smoltrain.model.hf_config import MODEL_TYPES, SMOLTRAIN, make_hf_config
from smoltrain.model.transformers_model import HuggingFaceModel

HERE = Path(__file__).parent
ENVIRONMENTS = {  # name -> what pip is asked for, exactly
    "transformers": ("torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0", "deepspeed==0.19.8"),
    "litgpt": ("torch==2.13.0", "litgpt==0.5.13", "lightning==2.6.6"),
}
INSTALLED_FILE = "installed.json"  # in an environment: every package's version; without it the making was cut short
INSTALL_S = 3600


class PeerUnavailable(Exception):
    """Why a peer does not run here, in one line."""


@dataclass(frozen=True)
class Peer:
    """A script beside this file, the environment it needs, its options."""

    script: str
    environment: str
    options: tuple[str, ...] = ()
    ranks: bool = False  # whether it can use more than one


PEERS = {
    "hf-trainer": Peer("hf_trainer.py", "transformers", ranks=True),
    "hf-trainer+compile": Peer("hf_trainer.py", "transformers", ("--compile",), ranks=True),
    "hf-trainer+ds": Peer("hf_trainer.py", "transformers", ("--deepspeed",), ranks=True),
    "litgpt": Peer("litgpt_pretrain.py", "litgpt"),
    "plain": Peer("plain.py", "transformers"),
    "plain+compile": Peer("plain.py", "transformers", ("--compile",)),
}


def parse_peer_names(names: str) -> dict[str, Peer]:
    """The peers of a list like 'hf-trainer,litgpt', in its order. Errors: UserError for a name that is none of them."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    wrong = [name for name in wanted if name not in PEERS]
    if wrong:
        raise UserError(
            *[Problem("no such peer", repr(name), suggest_choice(name, PEERS), "--against") for name in wrong]
        )
    return {name: PEERS[name] for name in wanted}


def build_peer_command(peer: Peer, task: Path, ranks: int, port: int) -> list[str]:
    """What runs a peer on so many ranks. Errors: PeerUnavailable, also where its environment cannot be made."""
    if ranks > 1 and not peer.ranks:
        raise PeerUnavailable("it runs on one rank")
    binaries = install_peer_environment(peer.environment) / "bin"
    words = [str(HERE / peer.script), str(task), *peer.options]
    if ranks == 1 and "--deepspeed" not in peer.options:
        return [str(binaries / "python"), *words]
    return [str(binaries / "torchrun"), f"--nproc-per-node={ranks}", f"--master-port={port}", *words]


def peer_variables(peer: Peer) -> dict[str, str]:
    """Environment variables for a peer, whose environment is made: where it keeps what it compiles for itself.

    A lock that an ended build has left there would let it wait for ever (torch/utils/file_baton.py), so it goes.
    """
    extensions = install_peer_environment(peer.environment) / "extensions"
    for lock in extensions.rglob("lock"):
        lock.unlink()
    return {"TORCH_EXTENSIONS_DIR": str(extensions)}


def describe_peer_model(peer: Peer, section: AnyModelSection) -> dict[str, Any]:
    """A model in the words of a peer's task. Errors: PeerUnavailable for a shape that it does not have."""
    if peer.environment == "litgpt":
        if isinstance(section, TransformersSection):
            raise PeerUnavailable("its GPT has smoltrain's own shapes, not those of transformers")
        return {"shape": section.model_dump(mode="json")}
    model = _auto_config_keywords(section)
    if model["model_type"] == MODEL_TYPES[SMOLTRAIN]:
        raise PeerUnavailable("transformers has no class of this shape")
    return {"model": model}


def _auto_config_keywords(section: AnyModelSection) -> dict[str, Any]:
    """The keywords of AutoConfig.for_model."""
    if isinstance(section, ModelSection):
        config = make_hf_config(section)
    else:
        built = build_model(section, device="meta")
        assert isinstance(built, HuggingFaceModel)
        config = built.inner.config.to_diff_dict()
    return {key: value for key, value in config.items() if key not in ("architectures", "auto_map", "dtype")}


def install_peer_environment(name: str) -> Path:
    """The folder of an environment, made now if it is not there yet: a venv and pip, minutes and a gigabyte or more.

    It is named after what stands in it, so that another version of smoltrain makes another one.

    Errors: PeerUnavailable.
    """
    packages = ENVIRONMENTS[name]
    folder = find_peer_environment(name)
    if not (folder / INSTALLED_FILE).is_file():
        print(f"installs {', '.join(packages)} and what they need into {folder}; this takes minutes, once", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip"]
        _run_installer([sys.executable, "-m", "venv", str(folder)])
        _run_installer([*pip, "install", "--quiet", *packages])
        listed = json.loads(_run_installer([*pip, "list", "--format=json"]))
        (folder / INSTALLED_FILE).write_text(
            json.dumps({package["name"]: package["version"] for package in listed}, indent=1)
        )
    return folder


def find_peer_environment(name: str) -> Path:
    """Where an environment is, or would be."""
    digest = hashlib.sha256(" ".join((*ENVIRONMENTS[name], sys.version)).encode()).hexdigest()[:8]
    return peer_cache_folder() / f"peers-{digest}"


def read_peer_versions(name: str) -> dict[str, str]:
    """Every package of an environment that was made."""
    return json.loads((install_peer_environment(name) / INSTALLED_FILE).read_text(encoding="utf-8"))


def peer_cache_folder() -> Path:
    """Where environments are kept: $XDG_CACHE_HOME/smoltrain, or ~/.cache/smoltrain."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smoltrain"


def _run_installer(words: Sequence[str]) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=INSTALL_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerUnavailable(f"it cannot be installed: {error}") from None
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        last = lines[-1] if lines else f"exit code {done.returncode}"
        raise PeerUnavailable(f"it cannot be installed: {last}")
    return done.stdout
