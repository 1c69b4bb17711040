"""Which of the files that lie in one place hold documents: by their names alone, on a disk, behind a URL, on the Hub.

Beside the documents of a published dataset lie its card, its licence and what its tools noted down: none of them is a
text to train on. What no reader reads is counted, so that it can be said.
"""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath

SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".ndjson", ".parquet")
RECORDS = (".jsonl", ".json", ".ndjson", ".parquet")  # a document is a record's text_field
COMPRESSED = (".gz", ".zst")  # behind any suffix but .parquet, which compresses its own columns
WANT = f"{' or '.join(SUFFIXES)}, or all but the last with {' or '.join(COMPRESSED)} behind it"
CARD = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|changelog|contributing|code_of_conduct|datasheet|data(set)?_?card)"
    r"([-_. ].*)?",
    re.IGNORECASE,
)
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
NOTES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")  # that the library datasets writes
STATE = "state.json"  # another one, beside dataset_info.json


def suffix_of(name: str) -> str:
    """The suffix that says how to read a file: the one before .gz or .zst, if it has such."""
    *_, before, last = ("", "", *(suffix.lower() for suffix in PurePosixPath(name).suffixes))
    return before if last in COMPRESSED and before != ".parquet" else last


def uncompressed(name: str) -> str:
    """The name of a readable file without the .gz or .zst behind it."""
    last = PurePosixPath(name).suffix
    return name.removesuffix(last) if last.lower() in COMPRESSED and suffix_of(name) in SUFFIXES else name


def chosen(names: Iterable[str]) -> tuple[list[str], dict[str, int]]:
    """Those of the files that hold documents, in their order; and how many others there are of each kind, in words.

    Cards and licences are documents only where nothing but .md files lies there.
    """
    names = list(names)
    beside = any(suffix_of(name) != ".md" for name in names if not is_card(name))
    folders = {PurePosixPath(name).parent for name in names if PurePosixPath(name).name == NOTES[0]}
    documents, others = [], Counter[str]()
    for name in names:
        path = PurePosixPath(name)
        if path.name in NOTES or (path.name == STATE and path.parent in folders):
            others["notes of datasets"] += 1
        elif is_card(name) and (beside or suffix_of(name) not in SUFFIXES):
            others["cards and licences"] += 1
        elif suffix_of(name) not in SUFFIXES:
            others[path.suffix.lower() or "without a suffix"] += 1
        else:
            documents.append(name)
    return documents, dict(sorted(others.items()))


def save_to_disk(names: Iterable[str]) -> bool:
    """Whether these are the files of a folder that datasets' save_to_disk wrote."""
    found = {PurePosixPath(name).name for name in names}
    return {STATE, NOTES[0]} <= found and any(name.endswith(".arrow") for name in found)


def counted(others: dict[str, int]) -> str:
    """As in "4 .csv, 1 without a suffix"."""
    return ", ".join(f"{count:,} {kind}" for kind, count in others.items())


def few(names: Iterable[str]) -> str:
    """The first three names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def shown(name: str) -> str:
    r"""A name on one line that can be printed and written: bytes that are no UTF-8 as \xe9, line ends as \n."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return CONTROL.sub(lambda sign: sign[0].encode("unicode_escape").decode(), text)


def is_card(name: str) -> bool:
    """Whether a file's name says that it is about the data. A file without a suffix counts too."""
    return suffix_of(name) in (".md", ".txt", "") and CARD.fullmatch(PurePosixPath(name).name) is not None
