"""The files below a folder that match a glob. Each folder is entered once, though links may lead to it, or in circles.

Hidden files and folders are left alone. Nothing is opened: a pipe without a writer would never answer.
"""

import glob
import os
import re
import stat
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from fsspec.utils import glob_translate

from smoltrain.data.documents.magic_bytes import GIT_ANNEX
from smoltrain.errors import Problem, UserError

SPECIAL_FILES = "pipes, sockets and devices"
BROKEN_LINKS = "broken links"
UNREADABLE_FOLDERS = "folders that cannot be opened"
REPEATED_FOLDERS = "links to folders that are read already"


def first_wildcard(parts: Sequence[str]) -> int | None:
    """Which part of a path is the first with a wildcard; None if none is."""
    for i, part in enumerate(parts):
        if any(sign in part for sign in "*?["):
            return i
    return None


def glob_files(root: Path, pattern: str) -> tuple[dict[str, Path], dict[str, int]]:
    """The regular files by their names below root, sorted; and how many things were passed over, by what they are.

    Errors: UserError for links that wait for git-annex.
    """
    walk = _FolderWalk(root)
    files: dict[str, Path] = {}
    for name in sorted(set(walk.glob(pattern))):
        path = root / name
        try:
            mode = path.stat().st_mode
        except OSError:
            _check_not_annex_link(path)
            walk.passed_over[BROKEN_LINKS] += 1
            continue
        if stat.S_ISREG(mode):
            files[name] = path
        elif not stat.S_ISDIR(mode):
            walk.passed_over[SPECIAL_FILES] += 1
    return files, dict(walk.passed_over)


class _FolderWalk:
    """Finds names below a folder, and counts what it passes over."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.passed_over = Counter[str]()

    def glob(self, pattern: str) -> Iterator[str]:
        """What matches below root, folders too. `**` is walked here: glob would follow links in circles."""
        # Within a part ** means no more than *, as in the shell.
        parts = [part if part == "**" else re.sub(r"\*+", "*", part) for part in pattern.split("/") if part != "."]
        if "**" not in parts:
            yield from self._glob_once(parts)
            return
        depth = parts.index("**")
        begins = sorted(self._glob_once(parts[:depth])) if depth else [""]
        match = re.compile(glob_translate("/".join(parts[depth:]))).match
        for begin, name in self._walk(begins):
            if match(name.removeprefix(begin).removeprefix("/")):
                yield name

    def _glob_once(self, parts: list[str]) -> list[str]:
        return glob.glob("/".join(parts), root_dir=self._root)  # noqa: PTH207 (skips hidden)

    def _walk(self, begins: list[str]) -> Iterator[tuple[str, str]]:
        """Breadth first, each real folder once, linked folders last.

        Gives (the one of `begins` that it is below, its name below root) of all that is no folder.
        """
        folders = deque((begin, begin) for begin in begins)
        linked_folders: deque[tuple[str, str]] = deque()
        entered: set[tuple[int, int]] = set()
        while folders or linked_folders:
            begin, name = (folders or linked_folders).popleft()
            try:
                status = (self._root / name).stat()
                if not stat.S_ISDIR(status.st_mode):
                    continue
                inode = (status.st_dev, status.st_ino)
                if inode in entered:
                    self.passed_over[REPEATED_FOLDERS] += 1
                    continue
                entered.add(inode)
                with os.scandir(self._root / name) as listed:
                    entries = sorted(listed, key=lambda entry: entry.name)
            except OSError:
                self.passed_over[UNREADABLE_FOLDERS] += 1
                continue
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                below = f"{name}/{entry.name}" if name else entry.name
                if not Path(entry.path).is_dir():
                    yield begin, below
                elif entry.is_symlink():
                    linked_folders.append((begin, below))
                else:
                    folders.append((begin, below))


def _check_not_annex_link(path: Path) -> None:
    """Errors: UserError if a link leads to where git-annex would put the file."""
    if path.is_symlink() and "annex/objects/" in str(path.readlink()):
        want = f"the file itself: `{GIT_ANNEX.command}` in its folder"
        raise UserError(Problem("a file is not there, but in git-annex", "a link to its place", want, str(path)))
