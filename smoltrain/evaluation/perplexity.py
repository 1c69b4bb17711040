"""The perplexity of any text under a trained model: `smoltrain perplexity`."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smoltrain.errors import Problem, UserError
from smoltrain.evaluation.read_text import read_file_documents
from smoltrain.evaluation.score import Window, batch_windows, make_windows, score_batch
from smoltrain.inference.load import LoadedModel

DEFAULT_OVERLAP = 2  # a window begins where this part of the one before has passed, as on transformers' page


@dataclass(frozen=True)
class TextLoss:
    """What a model makes of a text."""

    name: str
    documents: int
    bytes: int  # of UTF-8
    tokens: int  # each scored once; separators are none
    unspelled_bytes: int  # that no token stands for, as Tokenizer.bytes_per_id counts
    loss: float  # of all tokens together, nats

    @property
    def nats_per_token(self) -> float:
        """The mean loss."""
        return self.loss / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else math.inf  # a float overflows at 710

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits over the bytes of the text, so that tokenizers can be compared."""
        return self.loss / math.log(2) / self.bytes

    def as_dict(self) -> dict[str, Any]:
        """All of it, for --json."""
        return {
            "name": self.name, "perplexity": self.perplexity, "nats_per_token": self.nats_per_token,
            "bits_per_byte": self.bits_per_byte, "documents": self.documents, "bytes": self.bytes,
            "tokens": self.tokens, "unspelled_bytes": self.unspelled_bytes,
        }  # fmt: skip


@dataclass(frozen=True)
class WindowSettings:
    """How a text is cut, and why it is so."""

    context: int  # tokens that the model reads at most
    stride: int  # tokens between the beginnings of two windows
    reason: str

    def describe(self) -> str:
        """As in "in windows of 512 tokens (as many as it was trained with), each 256 behind the one before"."""
        return f"in windows of {self.context:,} tokens ({self.reason}), each {self.stride:,} behind the one before"


def choose_windows(loaded: LoadedModel, context: int | None, stride: int | None) -> WindowSettings:
    """What was asked for, or the context that the model was trained with and half of it.

    Errors: UserError for more tokens than the model can read, or a stride that would leave some out.
    """
    most = loaded.model.section.max_position_embeddings
    reason = "as --context asks"
    if context is None and loaded.config is not None:
        context = loaded.config.batch.sequence_length
        reason = "as many as it was trained with"
    elif context is None:
        context = most
        reason = "as many as it has positions"
    if not 1 <= context <= most:
        want = f"1 to {most:,}, the model's positions"
        raise UserError(Problem("the model cannot read so many tokens", f"{context:,}", want, "--context"))
    if stride is None:
        stride = max(1, context // DEFAULT_OVERLAP)
    if not 1 <= stride <= context:
        want = f"1 to {context:,}, the context: so that each token is scored"
        raise UserError(Problem("the stride does not fit the context", f"{stride:,}", want, "--stride"))
    return WindowSettings(context, stride, reason)


def measure_file(loaded: LoadedModel, path: Path, windows: WindowSettings, text_field: str = "text") -> TextLoss:
    """The loss of all documents of a file. Errors: UserError for what is no text, or has no token."""
    return measure_documents(loaded, read_file_documents(path, text_field), windows, str(path))


def measure_documents(
    loaded: LoadedModel, documents: Iterable[Iterable[str]], settings: WindowSettings, name: str
) -> TextLoss:
    """The loss of documents, each given as the pieces of its text; what is held in memory does not depend on them."""
    counts = {"documents": 0, "bytes": 0, "tokens": 0, "unspelled_bytes": 0}
    bytes_per_id = loaded.tokenizer.bytes_per_id()

    def encode(pieces: Iterable[str]) -> Iterator[Sequence[int]]:
        for number, piece in enumerate(pieces):
            [ids] = loaded.tokenizer.encode_batch([piece], [number > 0])
            num_bytes = len(piece.encode())
            counts["bytes"] += num_bytes
            counts["tokens"] += len(ids)
            counts["unspelled_bytes"] += num_bytes - int(bytes_per_id[ids].sum())
            yield ids

    def make_all_windows() -> Iterator[Window]:
        for pieces in documents:
            counts["documents"] += 1
            separator_id = loaded.tokenizer.separator_id
            yield from make_windows(encode(pieces), separator_id, settings.context, settings.stride)

    loss = 0.0
    num_scored = 0
    for batch in batch_windows(make_all_windows(), loaded.model.section.vocab_size):
        loss -= sum(score.log_probability for score in score_batch(loaded.model, batch))
        num_scored += sum(window.num_scored for window in batch)
    if not num_scored:
        raise UserError(Problem("there is no text", "no token", "at least one token", name))
    assert num_scored == counts["tokens"], "each token is scored once"
    return TextLoss(name, loss=loss, **counts)


def add_up(parts: Sequence[TextLoss]) -> TextLoss:
    """All texts as one."""
    return TextLoss(
        name="all", documents=sum(part.documents for part in parts), bytes=sum(part.bytes for part in parts),
        tokens=sum(part.tokens for part in parts), unspelled_bytes=sum(part.unspelled_bytes for part in parts),
        loss=sum(part.loss for part in parts),
    )  # fmt: skip


def format_text_loss(text: TextLoss) -> str:
    """One line."""
    losses = f"perplexity {text.perplexity:,.4f}, {text.nats_per_token:.5f} nats per token"
    noun = "document" if text.documents == 1 else "documents"
    counts = f"{text.documents:,} {noun}, {text.bytes:,} bytes, {text.tokens:,} tokens, each scored once"
    if text.unspelled_bytes > 0:
        counts = f"{counts}; no token stands for {text.unspelled_bytes:,} of the bytes"
    return f"{text.name}: {losses}, {text.bits_per_byte:.5f} bits per byte ({counts})"
