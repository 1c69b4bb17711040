"""Tokenise once: RUN/tokenizer/ and RUN/data/{train.bin, validation.bin, index.json}.

A .bin file is nothing but token ids (uint16, or uint32 past 65,536 ids). index.json says what they were made from. It
is written last, so that it exists only beside whole files: whatever a killed process left behind is written anew. From
then on the run lives on its own copies: neither the Hub nor a package is asked again.
"""

import contextlib
import hashlib
import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smoltrain import files
from smoltrain.data import fingerprints, hub, naming, packing
from smoltrain.data.sources import Document, documents
from smoltrain.data.tokenizer import Tokenizer, pieces
from smoltrain.errors import Problem, UserError
from smoltrain.schema import Config

SIDES = ("train", "validation")
FORMAT = 1
CHARACTERS_AT_ONCE = 2**20  # tokenised in one call: enough to keep all cores busy, in about 100 MB
CHARACTERS_PER_TOKEN, CHARACTERS_TO_TRAIN_ON = 4, 10**8  # of a Hub dataset, for a BPE of its own
PROGRESS_S = 10.0  # between lines


@dataclass(frozen=True)
class Prepared:
    """The tokens of a run: two memory-mapped streams (N,) of uint16 or uint32, their tokenizer and their index."""

    tokenizer: Tokenizer
    train: np.ndarray
    validation: np.ndarray
    index: dict[str, Any]
    tokenizer_name: str  # as the recipe calls it

    def describe(self) -> str:
        """One line: how many tokens and documents on either side, and how the validation side was held out."""
        train, validation = (self.index[side] for side in SIDES)
        return (
            f"{train['tokens']:,} tokens of {train['documents']} documents;"
            f" validation {validation['tokens']:,} of {validation['documents']}, held out by {self.index['held_out']}"
        )

    def describe_tokenizer(self) -> str:
        """One line: name, number of ids, special tokens."""
        t = self.tokenizer
        pad = "" if t.pad is None else f", pad {t.pad} = {t.pad_id}"
        return f"{self.tokenizer_name}: {t.num_ids:,} ids, separator {t.separator} = {t.separator_id}{pad}"


def prepare(config: Config, rows_per_step: int | None = None) -> Prepared:
    """Make the run's tokens, or find them made. One process calls this; the others `load` afterwards.

    rows_per_step is over all ranks; None is what batch says for one rank, and does not do for data.hub, of which no
    more is read than the plan needs. The first call gets or trains the tokenizer and tokenises each document once.
    Later calls compare fingerprints (every local file is hashed again) and sizes of the .bin files, and write nothing;
    a plan that has become longer goes round the same rows.

    Errors: UserError for bad documents or tokenizers, ids that the model has no room for, too few tokens for a step or
    for validation, and data other than those already prepared. Nothing that was complete is ever overwritten.
    """
    assert rows_per_step or config.data.hub is None, "how much of a Hub dataset is needed depends on rows_per_step"
    batch = config.batch
    rows_per_step = rows_per_step or batch.rows_per_step or batch.micro_batch * (batch.accumulation or 1)
    if _index_file(config).exists():
        prepared = load(config)
        fingerprints.check_same(prepared.index["fingerprint"], config, _index_file(config).parent)
        return prepared
    section = config.tokenizer
    given = None if section.name == "bpe" else naming.named(section)
    num_ids = given.num_ids if given else (section.vocab_size or 0) + (section.pad is not None)
    _check_ids(num_ids, config)  # a BPE: before training it
    fingerprint = fingerprints.make(config, given)
    sources = fingerprint["sources"]
    wanted = None if config.data.hub is None else _wanted(config, rows_per_step)
    if wanted:
        until = " and ".join(f"{num:,} {side} tokens" for side, num in wanted.items())
        print(f"data: {hub.describe(sources)} is read until there are {until}", flush=True)
    tokenizer = given or _train_tokenizer(config, sources, wanted)
    folder = _index_file(config).parent
    folder.mkdir(parents=True, exist_ok=True)
    partial = {side: folder / f"{side}.bin.partial" for side in SIDES}
    try:
        index: dict[str, Any] = {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "tokenizer_sha256": tokenizer.fingerprint(),
            "separator_id": tokenizer.separator_id,
        }
        index |= _write_tokens(config, tokenizer, sources, wanted, partial)
        check_rows(index["train"]["tokens"], index["validation"]["tokens"], config, rows_per_step)
        tokenizer.save(_tokenizer_folder(config))
        for path in (*_tokenizer_folder(config).iterdir(), _tokenizer_folder(config)):
            files.sync(path)
        for side in SIDES:
            _commit(partial[side], folder / f"{side}.bin")
        index_partial = folder / "index.json.partial"
        index_partial.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        _commit(index_partial, _index_file(config))
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    return load(config)


def load(config: Config) -> Prepared:
    """The tokens that `prepare` made. Errors: UserError if there are none, or if files were changed since."""
    file, tokenizer_folder = _index_file(config), _tokenizer_folder(config)
    if not file.exists():
        raise UserError(Problem("the data are not prepared", f"no {file}", "`prepare` to run first", "run.name"))
    want = "what was prepared (delete the folder to prepare anew)"
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        sizes = {f"{side}.bin": index[side]["bytes"] for side in SIDES}
        dtype, tokenizer_sha256 = np.dtype(index["dtype"]), index["tokenizer_sha256"]
        pad = index["fingerprint"].get("pad")  # not the config's: `prepare` compares the two and shows both
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(Problem("the index of the data is damaged", repr(error), want, str(file))) from None
    for name, size in sizes.items():
        path = file.parent / name
        saw = path.stat().st_size if path.exists() else 0
        if saw != size:
            raise UserError(Problem(f"{name} is damaged", f"{saw:,} bytes", f"{size:,} bytes", str(file.parent)))
    tokenizer = Tokenizer.from_folder(tokenizer_folder, config.tokenizer.separator, pad)
    if tokenizer.fingerprint() != tokenizer_sha256:
        raise UserError(Problem("the run's tokenizer has changed", "another one", want, str(tokenizer_folder)))
    streams = {side: np.memmap(file.parent / f"{side}.bin", dtype, mode="r") for side in SIDES}
    return Prepared(tokenizer, streams["train"], streams["validation"], index, config.tokenizer.name)


def held_out(name: str, share: float) -> bool:
    """Whether the document of this name is for validation: a fixed point of [0, 1) for each name, compared to `share`.

    A larger share therefore holds out the same documents and more.
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < share * 2**64


def check_rows(num_train_tokens: int, num_validation_tokens: int, config: Config, rows_per_step: int) -> None:
    """Errors: UserError unless there are rows for one whole step and one row for validation."""
    length = config.batch.sequence_length
    train, validation = (packing.num_rows(n, length) for n in (num_train_tokens, num_validation_tokens))
    problems = []
    if train < rows_per_step:
        saw = f"{train:,} rows of {length} targets ({num_train_tokens:,} tokens)"
        want = f"at least one step's {rows_per_step:,} rows"
        problems.append(Problem("the training data are too few", saw, want, "data, batch.sequence_length or batch"))
    if validation < 1:
        saw, want = f"{num_validation_tokens:,} tokens", f"at least one row of {length} targets"
        change = f"data.validation_share = {config.data.validation_share}"
        problems.append(Problem("the validation data are too few", saw, want, change))
    if problems:
        raise UserError(*problems)


def _index_file(config: Config) -> Path:
    return config.run_folder / "data" / "index.json"


def _tokenizer_folder(config: Config) -> Path:
    return config.run_folder / "tokenizer"


def _documents(config: Config, sources: dict[str, Any]) -> Iterator[Document]:
    """All documents; those of a Hub dataset as they stand at the commit that the fingerprint of the sources names."""
    return documents(config.data) if config.data.hub is None else hub.documents(config.data, sources["revision"])


def _wanted(config: Config, rows_per_step: int) -> dict[str, int]:
    """Tokens of either side that the plan and its evaluations need, where no row is to come twice."""
    num_steps = sum(phase.steps for phase in config.phases)
    rows = {"train": num_steps * rows_per_step, "validation": config.evaluate.rows if config.evaluate.every else 1}
    return {side: rows[side] * config.batch.sequence_length + 1 for side in SIDES}


def _train_tokenizer(config: Config, sources: dict[str, Any], wanted: dict[str, int] | None) -> Tokenizer:
    """On all documents, the held-out ones too: which ones those are can depend on the number of tokens.

    Of a Hub dataset on the first ones, about as much text as will be tokenised, for it has no end worth waiting for.
    """
    section = config.tokenizer
    limit = math.inf if wanted is None else min(CHARACTERS_PER_TOKEN * sum(wanted.values()), CHARACTERS_TO_TRAIN_ON)
    texts = _first((document.text for document in _documents(config, sources)), limit)
    return Tokenizer.train_bpe(texts, section.vocab_size or 0, section.separator, section.pad)


def _first(texts: Iterable[str], limit: float) -> Iterator[str]:
    """The texts up to the one that brings them to `limit` characters."""
    size = 0
    for text in texts:
        yield text
        size += len(text)
        if size >= limit:
            return


def _check_ids(num_ids: int, config: Config) -> None:
    room = config.model.vocab_size
    if num_ids > room:
        want = f"at most model.vocab_size = {room:,}"
        what = "the tokenizer has more ids than the model"
        raise UserError(Problem(what, f"{num_ids:,}", want, "model.vocab_size or tokenizer"))


def _batches(stream: Iterator[Document]) -> Iterator[list[tuple[str, str, bool]]]:
    """The documents in lists of about CHARACTERS_AT_ONCE: (name, a piece of its text, whether it is the last one)."""
    batch, size = [], 0
    for document in stream:
        *first, last = pieces(document.text, CHARACTERS_AT_ONCE)
        for piece, ends in (*((piece, False) for piece in first), (last, True)):
            batch.append((document.name, piece, ends))
            size += len(piece)
            if size >= CHARACTERS_AT_ONCE:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _encoded(stream: Iterator[Document], tokenizer: Tokenizer) -> Iterator[tuple[str, list[int], bool]]:
    """The documents in parts: (name, ids, whether the document ends here)."""
    for batch in _batches(stream):
        encoded = tokenizer.encode_batch([piece for _, piece, _ in batch])
        for (name, _, ends), ids in zip(batch, encoded, strict=True):
            yield name, ids, ends


def _write_tokens(
    config: Config,
    tokenizer: Tokenizer,
    sources: dict[str, Any],
    wanted: dict[str, int] | None,
    partial: dict[str, Path],
) -> dict[str, Any]:
    """Tokenise the documents, each into the partial file of its side, until there are as many tokens as wanted.

    Returns the index's part about the files.
    """
    dtype = np.dtype(np.uint16 if tokenizer.num_ids <= 2**16 else np.uint32)
    counts, tokens, said = Counter[str](), Counter[str](), time.monotonic()
    with contextlib.ExitStack() as stack:
        out = {side: stack.enter_context(path.open("wb")) for side, path in partial.items()}
        for name, ids, ends in _encoded(_documents(config, sources), tokenizer):
            side = "validation" if held_out(name, config.data.validation_share) else "train"
            part = packing.stream(ids, tokenizer.separator_id if ends else None, dtype)
            out[side].write(part.tobytes())
            tokens[side] += len(part)
            counts[side] += ends
            if ends and wanted and all(tokens[side] >= num for side, num in wanted.items()):
                break
            if time.monotonic() >= said + PROGRESS_S:
                said = time.monotonic()
                so_far = " and ".join(f"{tokens[side]:,} {side} tokens" for side in SIDES)
                print(f"data: {so_far} of {counts.total():,} documents so far", flush=True)
    rule = "documents"
    if not (counts["train"] and counts["validation"]):
        rule = "tail"
        num_all = counts.total()
        _move_tail(partial, config.data.validation_share, dtype)
        tail = np.fromfile(partial["validation"], dtype)
        counts["validation"] = int(np.count_nonzero(tail == tokenizer.separator_id))  # documents that end in the tail
        counts["train"] = num_all - counts["validation"]
    index: dict[str, Any] = {"held_out": rule, "dtype": dtype.name}
    for side, path in partial.items():
        sha256 = files.sha256(path)
        size = path.stat().st_size
        about = {"tokens": size // dtype.itemsize, "documents": counts[side], "bytes": size, "sha256": sha256}
        index[side] = about
    return index


def _move_tail(partial: dict[str, Path], share: float, dtype: np.dtype) -> None:
    """With all tokens in one file, in document order: leave the first ones in train, hold out the last `share`."""
    train, validation = partial["train"], partial["validation"]
    if train.stat().st_size == 0:
        validation.replace(train)
    num_tokens = train.stat().st_size // dtype.itemsize
    cut = (num_tokens - math.ceil(num_tokens * share)) * dtype.itemsize
    with train.open("r+b") as whole, validation.open("wb") as tail:
        whole.seek(cut)
        shutil.copyfileobj(whole, tail)
        whole.truncate(cut)


def _commit(partial: Path, final: Path) -> None:
    """Rename a written file to its final name, so that after a power cut it is there whole or not at all."""
    files.sync(partial)
    partial.replace(final)
    files.sync(final.parent)
