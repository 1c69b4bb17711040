"""What `tokenizer.name` can be, and the tokenizer that each form of it stands for."""

from pathlib import Path

import tokenizers
from tokenizers import models

from smoltrain.config.schema import TokenizerSection
from smoltrain.data.documents.shard import exception_message
from smoltrain.data.tokenizers.offline import END_OF_TEXT, PACKAGED_TOKENIZERS, prepare_packaged_tokenizer
from smoltrain.data.tokenizers.tokenizer import TOKENIZER_FILE, Tokenizer, build_byte_level_bpe
from smoltrain.errors import Problem, UserError, format_value, suggest_choice

TIKTOKEN = "tiktoken:gpt2"
TIKTOKEN_S = 60.0  # tiktoken itself would wait for its server for ever
TOKENIZER_NAMES = ("bpe", *PACKAGED_TOKENIZERS, TIKTOKEN)


def load_named_tokenizer(section: TokenizerSection) -> Tokenizer:
    """The tokenizer of any name but 'bpe', which is no tokenizer before it is trained.

    Errors: UserError if the name has no known form, or what it names cannot be had or read, or lacks the separator.
    """
    from smoltrain.data.tokenizers.hub import download_tokenizer, is_hub_repo_name

    name, separator, pad = section.name, section.separator, section.pad
    if not is_tokenizer_folder(name):
        if name in PACKAGED_TOKENIZERS:
            return Tokenizer.from_folder(prepare_packaged_tokenizer(name), separator, pad)
        if name == TIKTOKEN:
            return Tokenizer(_convert_tiktoken_gpt2(), separator, pad)
        if is_hub_repo_name(name):
            return Tokenizer.from_folder(download_tokenizer(name).parent, separator, pad)
        if "/" not in name and not name.startswith("~"):
            known = suggest_choice(name, TOKENIZER_NAMES)
            want = f"{known}, a folder with {TOKENIZER_FILE}, or OWNER/NAME on the Hugging Face Hub"
            raise UserError(Problem("no such tokenizer", format_value(name), want, "tokenizer.name"))
    return Tokenizer.from_folder(name, separator, pad)


def is_tokenizer_folder(name: str) -> bool:
    """Whether a name is that of a local folder with a tokenizer, which comes before any other meaning of it."""
    try:
        return name != "" and (Path(name).expanduser() / TOKENIZER_FILE).is_file()
    except (OSError, RuntimeError):  # no permission, too long a name, ~nobody: Tokenizer.from_folder says which
        return False


def _convert_tiktoken_gpt2() -> tokenizers.Tokenizer:
    """tiktoken's GPT-2 with the same ids. tiktoken keeps the ranks of the merged tokens, but not what was merged."""
    from smoltrain.data.documents.hub import ask_with_timeout

    try:
        import tiktoken
    except ImportError:
        want = "`pip install tiktoken`, or tokenizer=gpt2, which has the same ids"
        raise UserError(Problem("tiktoken is not installed", repr(TIKTOKEN), want, "tokenizer.name")) from None
    try:
        encoding = ask_with_timeout(TIKTOKEN_S, lambda: tiktoken.get_encoding("gpt2"))
    except (OSError, ValueError) as error:
        want = "its two files from openaipublic.blob.core.windows.net, or tokenizer=gpt2, which has the same ids"
        raise UserError(
            Problem("tiktoken cannot load its GPT-2", _innermost_message(error), want, "tokenizer.name")
        ) from None
    letter = _byte_alphabet()
    ranks: dict[bytes, int] = {}
    merges: list[tuple[str, str]] = []
    spelled: dict[bytes, str] = {}
    for rank in range(encoding.eot_token):
        token = encoding.decode_single_token_bytes(rank)
        spelled[token] = "".join(letter[byte] for byte in token)
        if len(token) > 1:
            left, right = _find_merge(token, ranks)
            merges.append((spelled[left], spelled[right]))
        ranks[token] = rank
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()} | {END_OF_TEXT: encoding.eot_token}
    return build_byte_level_bpe(models.BPE(vocabulary, merges), [END_OF_TEXT])


def _innermost_message(error: BaseException) -> str:
    """What the innermost of nested errors says: an HTTP client wraps the system's short one in long ones."""
    inner = error.__cause__ or error.__context__
    return exception_message(error) if inner is None else _innermost_message(inner)


def _find_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens whose merge is `token`: what BPE leaves of it while it knows only the merges of lower rank."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        first = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts[0], parts[1]


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's letter for each byte: itself where it can be seen in Latin-1, else one from U+0100 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = (byte for byte in range(256) if byte not in visible)
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
