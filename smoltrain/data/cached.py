"""Tokenise once: RUN/tokenizer/ and RUN/data/{train.bin, validation.bin, index.json}.

A .bin file is nothing but token ids (uint16, or uint32 past 65,536 ids). index.json says what they were made from. It
is written last, so that it exists only beside whole files: whatever a killed process left behind is written anew.
"""

import contextlib
import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smoltrain import files
from smoltrain.data import packing
from smoltrain.data.sources import Document, documents, fingerprint
from smoltrain.data.tokenizer import Tokenizer, pieces
from smoltrain.errors import Problem, UserError
from smoltrain.schema import Config

SIDES = ("train", "validation")
FORMAT = 1
CHARACTERS_AT_ONCE = 2**20  # tokenised in one call: enough to keep all cores busy, in about 100 MB


@dataclass(frozen=True)
class Prepared:
    """The tokens of a run: two memory-mapped streams (N,) of uint16 or uint32, their tokenizer and their index."""

    tokenizer: Tokenizer
    train: np.ndarray
    validation: np.ndarray
    index: dict[str, Any]

    def describe(self) -> str:
        """One line: how many tokens and documents on either side, and how the validation side was held out."""
        train, validation = (self.index[side] for side in SIDES)
        return (
            f"{train['tokens']:,} tokens of {train['documents']} documents;"
            f" validation {validation['tokens']:,} of {validation['documents']}, held out by {self.index['held_out']}"
        )


def prepare(config: Config) -> Prepared:
    """Make the run's tokens, or find them made. One process calls this; the others `load` afterwards.

    The first call trains or loads the tokenizer and tokenises each document once. Later calls compare the fingerprints
    (every source file is hashed again) and the sizes of the .bin files, and write nothing.

    Errors: UserError for bad documents or tokenizers, ids that the model has no room for, too few tokens for a step or
    for validation, and data other than those already prepared. Nothing that was complete is ever overwritten.
    """
    name, separator = config.tokenizer.name, config.tokenizer.separator
    given = None if name == "bpe" else Tokenizer.from_folder(name, separator)
    _check_ids(given.num_ids if given else config.tokenizer.vocab_size or 0, config)  # a BPE: before training it
    asked = _fingerprint(config, given)
    if _index_file(config).exists():
        prepared = load(config)
        _check_same(prepared.index["fingerprint"], asked, config)
        return prepared
    tokenizer = given or _train_tokenizer(config)
    folder = _index_file(config).parent
    folder.mkdir(parents=True, exist_ok=True)
    partial = {side: folder / f"{side}.bin.partial" for side in SIDES}
    try:
        index = {"format": FORMAT, "fingerprint": asked, "tokenizer_sha256": tokenizer.fingerprint()}
        index |= _write_tokens(config, tokenizer, partial)
        check_rows(index["train"]["tokens"], index["validation"]["tokens"], config, _least_rows_per_step(config))
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
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(Problem("the index of the data is damaged", repr(error), want, str(file))) from None
    for name, size in sizes.items():
        path = file.parent / name
        saw = path.stat().st_size if path.exists() else 0
        if saw != size:
            raise UserError(Problem(f"{name} is damaged", f"{saw:,} bytes", f"{size:,} bytes", str(file.parent)))
    tokenizer = Tokenizer.from_folder(tokenizer_folder, config.tokenizer.separator)
    if tokenizer.fingerprint() != tokenizer_sha256:
        raise UserError(Problem("the run's tokenizer has changed", "another one", want, str(tokenizer_folder)))
    streams = {side: np.memmap(file.parent / f"{side}.bin", dtype, mode="r") for side in SIDES}
    return Prepared(tokenizer, streams["train"], streams["validation"], index)


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


def _train_tokenizer(config: Config) -> Tokenizer:
    """On all documents, the held-out ones too: which ones those are can depend on the number of tokens."""
    texts = (document.text for document in documents(config.data))
    return Tokenizer.train_bpe(texts, config.tokenizer.vocab_size or 0, config.tokenizer.separator)


def _check_ids(num_ids: int, config: Config) -> None:
    room = config.model.vocab_size
    if num_ids > room:
        want = f"at most model.vocab_size = {room:,}"
        what = "the tokenizer has more ids than the model"
        raise UserError(Problem(what, f"{num_ids:,}", want, "model.vocab_size or tokenizer"))


def _least_rows_per_step(config: Config) -> int:
    """What a step needs on any world: `prepare` does not know the world, and `open` looks again."""
    batch = config.batch
    return batch.rows_per_step or batch.micro_batch * (batch.accumulation or 1)


def _fingerprint(config: Config, given: Tokenizer | None) -> dict[str, Any]:
    """All that the tokens are a function of. A trained BPE is itself one of the sources and its size."""
    return {
        "sources": fingerprint(config.data),
        "tokenizer": {"sha256": given.fingerprint()} if given else {"bpe": config.tokenizer.vocab_size},
        "separator": config.tokenizer.separator,
        "validation_share": config.data.validation_share,
    }


def _check_same(made: dict[str, Any], asked: dict[str, Any], config: Config) -> None:
    before, now = dict(_leaves(made)), dict(_leaves(asked))
    changed = [key for key in sorted(before | now) if before.get(key) != now.get(key)]
    if not changed:
        return
    saw, want = ([f"{key} = {_short(side.get(key))}" for key in changed[:3]] for side in (now, before))
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    change = f"run.name to prepare them for a new run; {_index_file(config).parent} is left as it is"
    what = f"the run {config.run.name!r} was prepared from other data"
    raise UserError(Problem(what, ", ".join(saw) + more, ", ".join(want) + more, change))


def _leaves(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every path in a fingerprint and what stands there; a file is one such thing."""
    for key, value in tree.items():
        if isinstance(value, dict) and "bytes" not in value:
            yield from _leaves(value, f"{path}{key}/")
        else:
            yield f"{path}{key}", value


def _short(value: object) -> str:
    match value:
        case None:
            return "none"
        case {"bytes": size, "sha256": sha256}:
            return f"{size:,} bytes ({sha256[:8]})"
    return str(value)


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


def _write_tokens(config: Config, tokenizer: Tokenizer, partial: dict[str, Path]) -> dict[str, Any]:
    """Tokenise every document into the partial file of its side. Returns the index's part about the files."""
    dtype = np.dtype(np.uint16 if tokenizer.num_ids <= 2**16 else np.uint32)
    counts = Counter[str]()
    with contextlib.ExitStack() as stack:
        out = {side: stack.enter_context(path.open("wb")) for side, path in partial.items()}
        for batch in _batches(documents(config.data)):
            encoded = tokenizer.encode_batch([piece for _, piece, _ in batch])
            for (name, _, ends), ids in zip(batch, encoded, strict=True):
                side = "validation" if held_out(name, config.data.validation_share) else "train"
                out[side].write(packing.stream(ids, tokenizer.separator_id if ends else None, dtype).tobytes())
                counts[side] += ends
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
