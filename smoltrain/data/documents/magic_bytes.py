"""What a file is instead of what its suffix says, told by its first bytes: else its records are lost one by one."""

import codecs
import json
import re
from typing import NamedTuple

from smoltrain.errors import Problem, UserError

MAX_POINTER_BYTES = 1024  # a file that stands for another one is shorter
LFS_POINTER = re.compile(rb"version https://(git-lfs\.github|hawser\.github)\.com/spec/v\d+\r?\n(.*\r?\n)*oid sha256:")
ANNEX_POINTER = re.compile(rb"(\S*/)?annex/objects/\S+\s*")
ENCODING_HEAD_BYTES = 2**12  # bytes by which a file's encoding is told
WIDE_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # that of UTF-32-LE begins like the first
CONTROL_BYTES = bytes({*range(32)} - {*b"\t\n\f\r\x1b"})  # characters that texts do not hold


class Pointer(NamedTuple):
    """What a file is that only stands for another one."""

    tool: str
    command: str  # that brings the other one


GIT_LFS = Pointer("Git LFS", "git lfs pull")
GIT_ANNEX = Pointer("git-annex", "git annex get")


def detect_pointer(raw: bytes) -> Pointer | None:
    """Whose pointer a small file is, if it is one."""
    if LFS_POINTER.match(raw):
        return GIT_LFS
    return GIT_ANNEX if ANNEX_POINTER.fullmatch(raw) else None


def is_utf16_or_utf32(opening: bytes) -> bool:
    """Whether the first bytes of a text are of UTF-16 or UTF-32: a mark, or control characters in every other place."""
    if opening.startswith(WIDE_BOMS):
        return True
    if len(opening) < 8:
        return False
    places = (opening[0:ENCODING_HEAD_BYTES:2], opening[1:ENCODING_HEAD_BYTES:2])
    few, many = sorted(1 - len(half.translate(None, CONTROL_BYTES)) / len(half) for half in places)
    return many > 0.8 and few < 0.6


def check_json_lines(opening: bytes, place: str) -> None:
    """Errors: UserError if the first bytes of a file show that its lines are no records."""
    if is_utf16_or_utf32(opening):
        raise UserError(Problem("the file is not UTF-8", "UTF-16 or UTF-32", "`iconv -f UTF-16 -t UTF-8` of it", place))
    lines = [line for line in opening.removeprefix(codecs.BOM_UTF8).splitlines() if line.strip()]
    if lines and lines[0].lstrip().startswith(b"["):
        raise _not_json_lines_error("one JSON document, an array", "`jq -c '.[]'`", place)
    if len(lines) > 1 and lines[0].startswith(b"{") and not lines[1].startswith(b"{") and _is_json_prefix(lines[0]):
        raise _not_json_lines_error("one JSON document over several lines", "`jq -c`", place)


def check_one_record_per_line(line: bytes, place: str) -> None:
    """Errors: UserError if a file's first line, which is not JSON, holds several records."""
    try:
        text = line.decode().removeprefix("\ufeff").lstrip()
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return
    between, sign, _ = text[end:].partition("{")
    if not sign or between.strip():
        return
    if "\r" in between:
        raise _not_json_lines_error("lines that end in CR alone", "`tr '\\r' '\\n'`", place)
    raise _not_json_lines_error("several records on one line", "`jq -c .`", place)


def _is_json_prefix(line: bytes) -> bool:
    """Whether a line is the beginning of JSON."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(error.doc.rstrip()) - 1
    except ValueError:
        return False
    return False


def _not_json_lines_error(saw: str, how: str, place: str) -> UserError:
    want = f"one record per line, as {how} makes it"
    return UserError(Problem("the file holds no JSON Lines", saw, want, place))
