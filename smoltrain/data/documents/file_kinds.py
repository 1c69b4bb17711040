"""Which of the files that lie in one place hold documents: by their names alone, on a disk, behind a URL, on the Hub.

Beside the documents of a published dataset lie its card, its licence and what its tools noted down: none of them is a
text to train on. What no reader reads is counted, so that it can be said.
"""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath

from smoltrain.data.documents.shard import SUFFIXES, format_suffix

CARD_NAME = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|changelog|contributing|code_of_conduct|datasheet|data(set)?_?card)"
    r"([-_. ].*)?",
    re.IGNORECASE,
)
DATASETS_INFO_FILES = (
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
)  # that the library datasets writes
DATASETS_STATE_FILE = "state.json"  # another one, beside dataset_info.json


def select_documents(names: Iterable[str]) -> tuple[list[str], dict[str, int]]:
    """Those of the files that hold documents, in their order; and how many others there are of each kind, in words.

    Cards and licences are documents only where nothing but .md files lies there.
    """
    names = list(names)
    beside = any(format_suffix(name) != ".md" for name in names if not is_dataset_card(name))
    folders = {PurePosixPath(name).parent for name in names if PurePosixPath(name).name == DATASETS_INFO_FILES[0]}
    documents, others = [], Counter[str]()
    for name in names:
        path = PurePosixPath(name)
        if path.name in DATASETS_INFO_FILES or (path.name == DATASETS_STATE_FILE and path.parent in folders):
            others["notes of datasets"] += 1
        elif is_dataset_card(name) and (beside or format_suffix(name) not in SUFFIXES):
            others["cards and licences"] += 1
        elif format_suffix(name) not in SUFFIXES:
            others[path.suffix.lower() or "without a suffix"] += 1
        else:
            documents.append(name)
    return documents, dict(sorted(others.items()))


def is_save_to_disk_folder(names: Iterable[str]) -> bool:
    """Whether these are the files of a folder that datasets' save_to_disk wrote."""
    found = {PurePosixPath(name).name for name in names}
    return {DATASETS_STATE_FILE, DATASETS_INFO_FILES[0]} <= found and any(name.endswith(".arrow") for name in found)


def format_counts(others: dict[str, int]) -> str:
    """As in "4 .csv, 1 without a suffix"."""
    return ", ".join(f"{count:,} {kind}" for kind, count in others.items())


def abbreviate_names(names: Iterable[str]) -> str:
    """The first three names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def is_dataset_card(name: str) -> bool:
    """Whether a file's name says that it is about the data. A file without a suffix counts too."""
    return format_suffix(name) in (".md", ".txt", "") and CARD_NAME.fullmatch(PurePosixPath(name).name) is not None
