"""The files below a folder that match a glob. Each folder is entered once, though links may lead to it, or in circles.

Hidden files and folders are left alone. Nothing is opened: a pipe without a writer would never answer.
"""

import glob
import os
import re
import stat
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path

from fsspec.utils import glob_translate

from smoltrain.errors import Problem, UserError

SPECIAL_FILES = "pipes, sockets and devices"
BROKEN_LINKS = "broken links"
UNREADABLE_FOLDERS = "folders that cannot be opened"
REPEATED_FOLDERS = "links to folders that are read already"


def glob_files(root: Path, pattern: str) -> tuple[dict[str, Path], dict[str, int]]:
    """The regular files by their names below root, sorted; and how many things were passed over, by what they are.

    Errors: UserError for links that wait for git-annex.
    """
    passed = Counter[str]()
    files: dict[str, Path] = {}
    for name in sorted(set(_glob_names(root, pattern, passed))):
        path = root / name
        try:
            mode = path.stat().st_mode
        except OSError:
            _check_not_annex_link(path)
            passed[BROKEN_LINKS] += 1
            continue
        if stat.S_ISREG(mode):
            files[name] = path
        elif not stat.S_ISDIR(mode):
            passed[SPECIAL_FILES] += 1
    return files, dict(passed)


def _glob_names(root: Path, pattern: str, passed: Counter[str]) -> Iterator[str]:
    """What matches below root, folders too. `**` is walked here: glob would follow links in circles."""
    parts = [part if part == "**" else re.sub(r"\*+", "*", part) for part in pattern.split("/") if part != "."]
    if "**" not in parts:
        yield from glob.glob("/".join(parts), root_dir=root)  # noqa: PTH207 (skips hidden)
        return
    at = parts.index("**")
    begins = sorted(glob.glob("/".join(parts[:at]), root_dir=root)) if at else [""]  # noqa: PTH207
    match = re.compile(glob_translate("/".join(parts[at:]))).match
    for begin, name in _walk_folders(root, begins, passed):
        if match(name.removeprefix(begin).removeprefix("/")):
            yield name


def _walk_folders(root: Path, begins: list[str], passed: Counter[str]) -> Iterator[tuple[str, str]]:
    """(the one of `begins` that it is below, its name below root) of all that is no folder; linked folders last."""
    folders = deque((begin, begin) for begin in begins)
    links: deque[tuple[str, str]] = deque()
    entered: set[tuple[int, int]] = set()
    while folders or links:
        begin, name = (folders or links).popleft()
        try:
            about = (root / name).stat()
            if not stat.S_ISDIR(about.st_mode):
                continue
            if (about.st_dev, about.st_ino) in entered:
                passed[REPEATED_FOLDERS] += 1
                continue
            entered.add((about.st_dev, about.st_ino))
            with os.scandir(root / name) as listed:
                entries = sorted(listed, key=lambda entry: entry.name)
        except OSError:
            passed[UNREADABLE_FOLDERS] += 1
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            below = f"{name}/{entry.name}" if name else entry.name
            if not Path(entry.path).is_dir():
                yield begin, below
            elif entry.is_symlink():
                links.append((begin, below))
            else:
                folders.append((begin, below))


def _check_not_annex_link(path: Path) -> None:
    """Errors: UserError if a link leads to where git-annex would put the file."""
    if path.is_symlink() and "annex/objects/" in str(path.readlink()):
        want = "the file itself: `git annex get` in its folder"
        raise UserError(Problem("a file is not there, but in git-annex", "a link to its place", want, str(path)))
