"""What `tokenizer.name` can be, and the tokenizer that each form of it stands for."""

from pathlib import Path

import tokenizers
from tokenizers import models

from smoltrain.config.schema import TokenizerSection
from smoltrain.data.tokenizers.packaged import END_OF_TEXT, PACKAGED_TOKENIZERS, prepare_packaged_tokenizer
from smoltrain.data.tokenizers.tokenizer import TOKENIZER_FILE, Tokenizer, build_byte_level_bpe
from smoltrain.errors import Problem, UserError, exception_message, format_value, iterate_causes, suggest_choice
from smoltrain.timeout import call_with_timeout

TIKTOKEN = "tiktoken:gpt2"
TIKTOKEN_S = 60.0  # tiktoken itself would wait for its server for ever
TOKENIZER_NAMES = ("bpe", *PACKAGED_TOKENIZERS, TIKTOKEN)


def load_named_tokenizer(section: TokenizerSection) -> Tokenizer:
    """The tokenizer of any name but 'bpe', which is no tokenizer before it is trained.

    Errors: UserError if the name has no known form, or what it names cannot be had or read, or lacks the separator.
    """
    from smoltrain.data.documents.hub import is_hub_repo_name  # slow to import
    from smoltrain.data.tokenizers.hub import download_tokenizer

    name = section.name
    folder: str | Path = name
    if is_tokenizer_folder(name):
        pass  # a local folder comes before any other meaning of its name
    elif name in PACKAGED_TOKENIZERS:
        folder = prepare_packaged_tokenizer(name)
    elif name == TIKTOKEN:
        return Tokenizer(_convert_tiktoken_gpt2(), section.separator, section.pad)
    elif is_hub_repo_name(name):
        folder = download_tokenizer(name).parent
    elif "/" not in name and not name.startswith("~"):  # else it is a folder without a file, which from_folder says
        known = suggest_choice(name, TOKENIZER_NAMES)
        want = f"{known}, a folder with {TOKENIZER_FILE}, or OWNER/NAME on the Hugging Face Hub"
        raise UserError(Problem("no such tokenizer", format_value(name), want, "tokenizer.name"))
    return Tokenizer.from_folder(folder, section.separator, section.pad, is_named=True)


def is_tokenizer_folder(name: str) -> bool:
    """Whether a name is that of a local folder with a tokenizer, which comes before any other meaning of it."""
    try:
        return name != "" and (Path(name).expanduser() / TOKENIZER_FILE).is_file()
    except (OSError, RuntimeError):  # no permission, too long a name, ~nobody: Tokenizer.from_folder says which
        return False


def _convert_tiktoken_gpt2() -> tokenizers.Tokenizer:
    """tiktoken's GPT-2 with the same ids. tiktoken keeps the ranks of the merged tokens, but not what was merged."""
    way_out = "tokenizer=gpt2, which has the same ids"
    try:
        import tiktoken
    except ImportError:
        want = f"`pip install tiktoken`, or {way_out}"
        raise UserError(Problem("tiktoken is not installed", repr(TIKTOKEN), want, "tokenizer.name")) from None
    try:
        encoding = call_with_timeout(lambda: tiktoken.get_encoding("gpt2"), TIKTOKEN_S)
    except (OSError, ValueError) as error:
        # Its HTTP client wraps the system's short words in long ones.
        *_, innermost = iterate_causes(error, implicit=True)
        what, saw = "tiktoken cannot load its GPT-2", exception_message(innermost)
        want = f"its two files from openaipublic.blob.core.windows.net, or {way_out}"
        raise UserError(Problem(what, saw, want, "tokenizer.name")) from None
    letters = _byte_alphabet()
    ranks: dict[bytes, int] = {}
    spelled: dict[bytes, str] = {}
    merges: list[tuple[str, str]] = []
    for rank in range(encoding.eot_token):
        token = encoding.decode_single_token_bytes(rank)
        spelled[token] = "".join(letters[byte] for byte in token)
        if len(token) > 1:
            left, right = _find_merge(token, ranks)
            merges.append((spelled[left], spelled[right]))
        ranks[token] = rank
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()}
    vocabulary[END_OF_TEXT] = encoding.eot_token
    return build_byte_level_bpe(models.BPE(vocabulary, merges), [END_OF_TEXT])


def _find_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens whose merge is `token`: what BPE leaves of it while it knows only the merges of lower rank."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        lowest = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        parts[lowest : lowest + 2] = [parts[lowest] + parts[lowest + 1]]
    return parts[0], parts[1]


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's letter for each byte: itself where it can be seen in Latin-1, else one from U+0100 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
