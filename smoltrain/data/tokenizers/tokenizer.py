"""Text to token ids and back, over the `tokenizers` library."""

import contextlib
import functools
import hashlib
import json
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from smoltrain.data.tokenizers.companions import Companions, read_companions, write_companions
from smoltrain.data.tokenizers.encode_pieces import build_continuation_tokenizer
from smoltrain.data.tokenizers.special_tokens import (
    byte_letter_error,
    hide_special_tokens,
    is_byte_letter,
    special_token_ids,
    unknown_token_id,
)
from smoltrain.errors import Problem, UserError, exception_message, format_value

TOKENIZER_FILE = "tokenizer.json"
# Where byte-level pre-tokenizers cut anyway: before a space between two words, and before punctuation.
WORD_SEAM = re.compile(r"(?<=\w)(?= \w)")
PUNCTUATION_SEAM = re.compile(r"(?<=[^\W_])(?=[\n.,;:!?\u3001\u3002\uff0c\uff01\uff1f\uff1a\uff1b])")
SEAM_SEARCH_CHARACTERS = 2**16  # characters in which a seam is looked for
MAX_TRAINING_WORD = 256  # bytes, to train on: of a run of one kind of character the library's time is its square
MAX_TOKENIZER_BYTES = 2**30  # of a tokenizer.json; those of 256,000 ids have 35 MB
MAX_SHOWN_CHARACTERS = 200  # characters of a folder's name
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # how a vocabulary with byte fallback spells a byte


def split_text(text: str, size: int) -> Iterator[str]:
    """The text cut into pieces of `size` characters or a little more, and of at most SEAM_SEARCH_CHARACTERS more.

    The library needs some 100 bytes per byte of text at work, so a long text must not go in whole. It is cut at seams
    only, where byte-level BPE gives the pieces the very ids of the whole, as most others do. A text without any seam in
    SEAM_SEARCH_CHARACTERS (a genome, a page of symbols, a file filled up with NULs) is cut anywhere.
    """
    start = 0
    while len(text) - start > size + SEAM_SEARCH_CHARACTERS:
        first = start + size
        last = first + SEAM_SEARCH_CHARACTERS
        seam = WORD_SEAM.search(text, first, last) or PUNCTUATION_SEAM.search(text, first, last)
        end = seam.start() if seam else last
        yield text[start:end]
        start = end
    while (seam := WORD_SEAM.search(text, start + size)) is not None:
        yield text[start : seam.start()]
        start = seam.start()
    yield text[start:]


def build_byte_level_bpe(
    model: models.BPE, special: Iterable[str] = (), *, single_digits: bool = False
) -> tokenizers.Tokenizer:
    """The byte-level BPE of Radford et al. 2019 around a vocabulary and its merges: any text has ids, and comes back.

    Special tokens that the vocabulary lacks get the next ids. With `single_digits` each digit is cut off first.
    """
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if single_digits:
        digits = pre_tokenizers.Digits(individual_digits=True)
        inner.pre_tokenizer = pre_tokenizers.Sequence([digits, inner.pre_tokenizer])
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([_special_token(word) for word in special])
    return inner


class Tokenizer:
    """A `tokenizers.Tokenizer`, the special token that ends each document, and perhaps one that stands for padding.

    Text is only ever text: where it spells out a special token it is encoded like any other characters, so that no
    document can forge an end of document. Whoever loads the saved file elsewhere may find special tokens in a text.
    """

    def __init__(
        self, inner: tokenizers.Tokenizer, separator: str, pad: str | None = None, companions: Companions | None = None
    ) -> None:
        """Takes over `inner`, and adds `pad` behind its last id unless it is a special token already.

        `companions` came with it, and go where it is saved.
        Errors: UserError if `separator` is none of its special tokens, or `pad` cannot be one, or a special token is a
        letter that a byte-level tokenizer needs.
        """
        inner.encode_special_tokens = True
        inner.no_truncation()  # some published files cut at 512 tokens, or pad: both would falsify the data
        inner.no_padding()
        self.dropped_frame: list[str] = []  # special tokens that the file would add to a text
        if inner.num_special_tokens_to_add(is_pair=False):
            # We never add a BOS; whoever loads the saved file elsewhere shall not show the model one either.
            framed = inner.encode("")
            added = zip(framed.tokens, framed.special_tokens_mask, strict=True)
            self.dropped_frame = [token for token, is_added in added if is_added]
            inner.post_processor = None
        special = special_token_ids(inner)
        if separator not in special:
            want = "one of " + ", ".join(list(special)[:8]) if special else "a tokenizer with special tokens"
            what = "the separator is not a special token of the tokenizer"
            raise UserError(Problem(what, repr(separator), want, "tokenizer.separator"))
        if pad is not None and pad not in special:
            _add_pad_token(inner, pad)
            special = special_token_ids(inner)
        definition = json.loads(inner.to_str())
        self._inner = inner
        self._text_tokenizer = hide_special_tokens(inner, definition)
        self._continuation_tokenizer = build_continuation_tokenizer(self._text_tokenizer, definition)
        self.companions = companions or Companions()
        self.separator = separator
        self.separator_id = special[separator]
        self.pad = pad
        self.pad_id = None if pad is None else special[pad]
        self.special_tokens = frozenset(special)
        self.special_ids = frozenset(special.values())
        self.num_ids = _count_ids(inner)
        self._unknown_is_separator = unknown_token_id(definition["model"]) == self.separator_id
        self._decodes_bytes = '"ByteLevel"' in json.dumps(definition["decoder"])

    @classmethod
    def from_folder(
        cls, folder: str | Path, separator: str | int, pad: str | None = None, *, is_named: bool = False
    ) -> "Tokenizer":
        """That of FOLDER/tokenizer.json and what stands beside it; the separator may be named by its id.

        `is_named`: the folder is what a person has given as tokenizer.name, not one that a run has written.
        Errors: UserError if it is missing or unreadable, and those of Tokenizer.
        """
        file = _find_tokenizer_file(str(folder), is_named)
        try:
            inner = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing more precise
            what, want = "the tokenizer cannot be read", f"a valid {TOKENIZER_FILE}"
            raise UserError(Problem(what, exception_message(error)[:200], want, str(file))) from None
        companions = read_companions(file.parent)
        if isinstance(separator, int):  # the library takes no number of more than 32 bits
            end = inner.id_to_token(separator) if separator < _count_ids(inner) else None
            if end is None:
                what, saw = "the end of a text has no token", f"id {separator}"
                raise UserError(Problem(what, saw, "an id of the tokenizer", str(file)))
            separator = end
        else:
            end = companions.token_for_role("eos_token")
        _mark_special_tokens(inner, companions.special_tokens, end)
        return cls(inner, separator, pad, companions)

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int, separator: str, pad: str | None = None) -> "Tokenizer":
        """A byte-level BPE (Sennrich 2016, Radford 2019) of at most `vocab_size` ids; `separator` is id 0.

        `pad` comes on top. All 256 bytes are in the alphabet, so any text has ids. Equal texts in equal order give an
        equal tokenizer. Errors: UserError if the separator is the letter of a byte.
        """
        if is_byte_letter(separator):
            raise byte_letter_error(separator, "tokenizer.separator")
        inner = build_byte_level_bpe(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[separator],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        pre_tokenizer = inner.pre_tokenizer
        cut_long_words = pre_tokenizers.Split(tokenizers.Regex(f".{{{MAX_TRAINING_WORD}}}"), "isolated")
        inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizer, cut_long_words])  # to train, not to encode
        inner.train_from_iterator((piece for text in texts for piece in split_text(text, 4096)), trainer)
        inner.pre_tokenizer = pre_tokenizer
        return cls(inner, separator, pad)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special ones, on this thread. Errors: as `encode_batch`."""
        with _report_unencodable(text):
            encoding = self._text_tokenizer.encode(text, add_special_tokens=False)
        self._check_unknown([encoding.ids])
        return encoding.ids

    def encode_batch(self, texts: list[str], is_continuation: Sequence[bool] = ()) -> list[list[int]]:
        """The ids of each text, on all cores (or RAYON_NUM_THREADS of them).

        `is_continuation` says of each text whether it is a later piece of a document; () stands for none of them.
        Errors: UserError if the tokenizer has neither ids nor an unknown token for something in a text, or an unknown
        token that is the separator.
        """
        if self._continuation_tokenizer is self._text_tokenizer or not any(is_continuation):
            return self._encode_texts(self._text_tokenizer, texts)
        ids: list[list[int]] = [[] for _ in texts]
        for tokenizer, continues in ((self._text_tokenizer, False), (self._continuation_tokenizer, True)):
            places = [place for place, later in enumerate(is_continuation) if later == continues]
            for place, of_text in zip(places, self._encode_texts(tokenizer, [texts[i] for i in places]), strict=True):
                ids[place] = of_text
        return ids

    def _encode_texts(self, tokenizer: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
        with _report_unencodable(texts):
            encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        self._check_unknown(ids)
        return ids

    def _check_unknown(self, ids: list[list[int]]) -> None:
        """Errors: UserError if a text got the separator, where that is the unknown token."""
        if self._unknown_is_separator and any(self.separator_id in of_text for of_text in ids):
            raise _unencodable_text_error(f"{self.separator!r} for it", "an unknown token that is not the separator")

    def encode_template(self, text: str) -> list[int]:
        """The ids of what a chat template has written, where a special token that is spelled is meant."""
        with _report_unencodable(text):
            return self._template_tokenizer.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _template_tokenizer(self) -> tokenizers.Tokenizer:
        copy = tokenizers.Tokenizer.from_str(self._inner.to_str())
        copy.encode_special_tokens = False
        return copy

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special ones are left out, bytes that are no UTF-8 become U+FFFD."""
        return self._inner.decode(list(ids), skip_special_tokens=True)

    def token_to_id(self, word: str | None) -> int | None:
        """The id of a token; None where there is none."""
        return None if word is None else self._inner.token_to_id(word)

    def unused_ids(self, vocab_size: int) -> list[int]:
        """Rows of a model's table that stand for no token: those beyond this tokenizer's ids, and gaps in them."""
        return sorted(set(range(vocab_size)) - set(self._inner.get_vocab(with_added_tokens=True).values()))

    def bytes_per_id(self) -> np.ndarray:
        """How many bytes of UTF-8 text each id stands for, (num_ids,) int64; special tokens and gaps for none.

        Exact for byte-level tokenizers: a text's ids add up to its bytes, after the normalizer if there is one, and
        without those that the vocabulary lacks (SmolLM2's has no id for six control characters). For others a word
        counts as it is spelled, U+2581 as the space that it stands for and <0xNN> as its byte.
        """
        added = {token.content for token in self._inner.get_added_tokens_decoder().values()}
        sizes = np.zeros(self.num_ids, np.int64)
        for word, i in self._inner.get_vocab(with_added_tokens=True).items():
            if self._decodes_bytes and word not in added:
                sizes[i] = len(word)  # each character of the byte-level alphabet is one byte
            else:
                sizes[i] = 1 if BYTE_TOKEN.fullmatch(word) else len(word.replace("\u2581", " ").encode())
        sizes[list(self.special_ids)] = 0
        return sizes

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the bytes that `save` writes to tokenizer.json."""
        return hashlib.sha256(self._inner.to_str().encode()).hexdigest()

    def save(self, folder: Path, model_max_length: int | None = None, bos_token: str | None = None) -> None:
        """Write tokenizer.json, what transformers' AutoTokenizer.from_pretrained needs beside it for equal ids, and
        what came with it: chat templates and special tokens.

        model_max_length (tokens) is the longest input that transformers lets pass without a warning. bos_token takes
        the place of the one that came.
        """
        folder.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            # Theirs, if it has one: a chat template may spell it.
            "eos_token": self.companions.tokenizer_config.get("eos_token") or self.separator,
            "clean_up_tokenization_spaces": False,  # true would delete spaces before punctuation when decoding
            "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 would add token_type_ids
        }
        if self.pad is not None:
            config["pad_token"] = self.pad
        if bos_token is not None:
            config["bos_token"] = bos_token
        if model_max_length is not None:
            config["model_max_length"] = model_max_length
        (folder / TOKENIZER_FILE).write_text(self._inner.to_str(), encoding="utf-8")
        write_companions(self.companions, folder, config)


def _special_token(word: str) -> AddedToken:
    return AddedToken(word, special=True, normalized=False)


def _find_tokenizer_file(folder: str, is_named: bool) -> Path:
    """FOLDER/tokenizer.json. Errors: UserError, without opening it, if it is not there or cannot be one."""
    shown = folder if folder.isprintable() and len(folder) <= MAX_SHOWN_CHARACTERS else format_value(folder)
    what = "the tokenizer is missing"
    try:
        file = (Path(folder) / TOKENIZER_FILE).expanduser()
        status = file.stat()
        is_file = stat.S_ISREG(status.st_mode)
        if is_file and status.st_size <= MAX_TOKENIZER_BYTES:
            return file
        what = "the tokenizer cannot be read"
        reason = f"has {status.st_size:,} bytes" if is_file else "is no file"
        saw = f"{TOKENIZER_FILE} in {shown} {reason}"
    except (FileNotFoundError, NotADirectoryError):
        saw = f"no {TOKENIZER_FILE} in {shown}" if Path(folder).expanduser().is_dir() else f"no folder {shown}"
    except (OSError, ValueError, RuntimeError) as error:  # no permission, too long a name, a NUL in it, ~nobody
        saw = f"{shown}, {error.strerror if isinstance(error, OSError) else error}"
    if is_named:
        raise UserError(Problem(what, saw, f"a folder with {TOKENIZER_FILE}, or 'bpe' to train one", "tokenizer.name"))
    raise UserError(Problem(what, saw, f"{TOKENIZER_FILE} as it was written", f"the folder {shown}"))


@contextlib.contextmanager
def _report_unencodable(given: object) -> Iterator[None]:
    """Errors: UserError for whatever the library raises about a text: it has no more precise exception."""
    try:
        yield
    except TypeError:  # for half a character, too, which UTF-8 cannot spell
        raise UserError(
            Problem("this is no text", format_value(given), "a str that UTF-8 can spell", "the text")
        ) from None
    except Exception as error:
        raise _unencodable_text_error(exception_message(error), "an unknown token") from None


def _unencodable_text_error(saw: str, want: str) -> UserError:
    return UserError(Problem("a text has what the tokenizer cannot spell", saw, want, "tokenizer.name"))


def _mark_special_tokens(inner: tokenizers.Tokenizer, words: Iterable[str], end: str | None) -> None:
    """Added tokens that have a role, and the end of a text, become special, whatever tokenizer.json says of them.

    So transformers does it. Their ids stay.
    """
    added = {token.content: token for token in inner.get_added_tokens_decoder().values()}
    if end is not None and end not in added and inner.token_to_id(end) is not None:
        inner.add_special_tokens([_special_token(end)])
    for word in sorted({*words, end} & added.keys()):
        token = added[word]
        if not token.special:
            token.special = True
            inner.add_special_tokens([token])


def _count_ids(inner: tokenizers.Tokenizer) -> int:
    """The largest id + 1: ids may have gaps."""
    return 1 + max(inner.get_vocab(with_added_tokens=True).values())


def _add_pad_token(inner: tokenizers.Tokenizer, pad: str) -> None:
    """As a special token with the next id. Errors: UserError if text has that id, or the library gives another one."""
    what = "the pad token cannot be added"
    next_id = _count_ids(inner)
    if inner.token_to_id(pad) is not None:
        saw = f"{pad!r}, an ordinary token with id {inner.token_to_id(pad)}"
        raise UserError(Problem(what, saw, "a special token or a new word", "tokenizer.pad"))
    inner.add_special_tokens([_special_token(pad)])
    if inner.token_to_id(pad) != next_id:  # the library counts the words, so a vocabulary with gaps gets a taken id
        saw = f"{pad!r} as id {inner.token_to_id(pad)}"
        raise UserError(Problem(what, saw, f"id {next_id}, the next one", "tokenizer.pad"))
