"""Special tokens out of the reach of text.

With `encode_special_tokens` the library looks for no special token in a text, but its model may still make one's id: a
Unigram, WordPiece or WordLevel model has them among its words, and a BPE may have merges that end in one. So texts are
encoded by a copy in which the special tokens have names that no text holds. The ids are the same.
"""

import json
import secrets
from typing import Any

import tokenizers
from tokenizers import pre_tokenizers

from smoltrain.errors import Problem, UserError, format_value

BYTE_LETTERS = frozenset(pre_tokenizers.ByteLevel.alphabet())


def special_token_ids(inner: tokenizers.Tokenizer) -> dict[str, int]:
    """The special tokens of a tokenizer and their ids."""
    return {token.content: i for i, token in inner.get_added_tokens_decoder().items() if token.special}


def hide_special_tokens(inner: tokenizers.Tokenizer, definition: dict[str, Any]) -> tokenizers.Tokenizer:
    """A copy of the tokenizer that cannot produce a special token's id from text; `inner` itself if it already cannot.

    `definition` is inner's JSON. Text that spells a special token gets what else there is for it: smaller pieces, its
    bytes, or the unknown token. Errors: UserError if a special token is the letter for a byte, which has no other id.
    """
    special = special_token_ids(inner)
    model = definition["model"]
    for word in special:
        if is_byte_letter(word) and _is_byte_level(definition) and word in model["vocab"]:
            raise byte_letter_error(word, "tokenizer")
    if not any(_can_produce_token(word, model) for word in special):
        return inner
    prefix = f"\U0010ffff{secrets.token_hex(16)}:"  # drawn anew in each process: nobody can write it into a text
    names = {word: f"{prefix}{i}" for word, i in special.items()}
    renamed = {
        "added_tokens": [_rename_added_token(token, names) for token in definition["added_tokens"]],
        "model": _rename_in_model(model, names),
        "post_processor": None,  # no text gets its tokens, and it may name some
    }
    copy = tokenizers.Tokenizer.from_str(json.dumps(definition | renamed))
    copy.encode_special_tokens = True
    if special_token_ids(copy) != {names[word]: i for word, i in special.items()}:
        what, saw = "special tokens cannot be kept out of the reach of text", f"other ids for {', '.join(special)}"
        raise UserError(Problem(what, format_value(saw), "ids that do not depend on a name", "tokenizer.name"))
    return copy


def unknown_token_id(model: dict[str, Any]) -> int | None:
    """The id that a model gives to what it has no other id for."""
    return model["unk_id"] if model["type"] == "Unigram" else model["vocab"].get(model.get("unk_token"))


def is_byte_letter(word: str) -> bool:
    """Whether a byte-level tokenizer spells a byte so: most characters of ASCII and Latin-1 stand for themselves."""
    return word in BYTE_LETTERS


def byte_letter_error(word: str, key: str) -> UserError:
    """A special token of one character, in a tokenizer that needs it for text."""
    want = "two characters or more, as in <|endoftext|>"
    return UserError(Problem("a special token is a sign that texts are made of", repr(word), want, key))


def _is_byte_level(definition: dict[str, Any]) -> bool:
    return "ByteLevel" in json.dumps([definition["pre_tokenizer"], definition["normalizer"]])


def _can_produce_token(word: str, model: dict[str, Any]) -> bool:
    """Whether a model may make a special token's id of some text; false only if that is certain."""
    vocabulary = model["vocab"]
    if model["type"] == "Unigram":
        return any(piece == word for piece, _ in vocabulary)
    if word not in vocabulary:
        return False
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model["type"] != "BPE" or model.get("ignore_merges") or affixes or len(word) == 1:
        return True
    if model.get("byte_fallback") and word.startswith("<0x"):
        return True
    return any(left + right == word for left, right in model["merges"])


def _rename_added_token(token: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """An added token under its new name, which is searched for in no text."""
    if not token["special"]:
        return token
    plain = {"normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    return token | plain | {"content": names[token["content"]]}


def _rename_in_model(model: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """A model with new names for special tokens, and without the merges that lead to them or from them."""
    if model["type"] == "Unigram":
        return model | {"vocab": [[names.get(piece, piece), score] for piece, score in model["vocab"]]}
    renamed = model | {"vocab": {names.get(word, word): i for word, i in model["vocab"].items()}}
    if model.get("unk_token") is not None:
        renamed["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if model["type"] == "BPE":
        prefix = model.get("continuing_subword_prefix") or ""
        merges: list[list[str]] = []
        for left, right in model["merges"]:
            merged = left + right.removeprefix(prefix)
            if names.keys().isdisjoint((left, right, merged)):
                merges.append([left, right])
        renamed["merges"] = merges
    return renamed
