"""Which of the files that lie in one place hold documents: by their names alone, on a disk, behind a URL, on the Hub.

Beside the documents of a published dataset lie its card, its licence and what its tools noted down: none of them is a
text to train on. What no reader reads is counted, so that it can be said.
"""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath

from smoltrain.data.documents.readers import find_format, format_suffix

CARD_NAME = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|changelog|contributing|code_of_conduct|datasheet|data(set)?_?card)"
    r"([-_. ].*)?",
    re.IGNORECASE,
)
# What the library datasets writes beside the data.
DATASET_INFO = "dataset_info.json"
DATASETS_INFO_FILES = (DATASET_INFO, "dataset_infos.json", "dataset_dict.json")
DATASETS_STATE_FILE = "state.json"  # only where DATASET_INFO lies beside it: else it may be anybody's


def select_documents(names: Iterable[str]) -> tuple[list[str], dict[str, int]]:
    """Those of the files that hold documents, in their order; and how many others there are of each kind, in words.

    Cards and licences are documents only where nothing but .md files lies there.
    """
    names = list(names)
    has_other_data = any(format_suffix(name) != ".md" for name in names if not is_dataset_card(name))
    info_folders = {PurePosixPath(name).parent for name in names if PurePosixPath(name).name == DATASET_INFO}
    documents: list[str] = []
    others = Counter[str]()
    for name in names:
        path = PurePosixPath(name)
        is_readable = find_format(name) is not None
        is_state = path.name == DATASETS_STATE_FILE and path.parent in info_folders
        if path.name in DATASETS_INFO_FILES or is_state:
            others["notes of datasets"] += 1
        elif is_dataset_card(name) and (has_other_data or not is_readable):
            others["cards and licences"] += 1
        elif is_readable:
            documents.append(name)
        else:
            others[path.suffix.lower() or "without a suffix"] += 1
    return documents, dict(sorted(others.items()))


def is_dataset_card(name: str) -> bool:
    """Whether a file's name says that it is about the data. A file without a suffix counts too."""
    return format_suffix(name) in (".md", ".txt", "") and CARD_NAME.fullmatch(PurePosixPath(name).name) is not None


def is_save_to_disk_folder(names: Iterable[str]) -> bool:
    """Whether these are the files of a folder that datasets' save_to_disk wrote."""
    found = {PurePosixPath(name).name for name in names}
    return {DATASETS_STATE_FILE, DATASET_INFO} <= found and any(name.endswith(".arrow") for name in found)


def format_counts(counts: dict[str, int]) -> str:
    """As in "4 .csv, 1 without a suffix"."""
    return ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
