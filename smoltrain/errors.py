"""The one form in which smoltrain reports a mistake that its user can mend."""

import difflib
import errno
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from smoltrain.redact import redact_text

# Exit codes of every entry point (docs/troubleshooting.md lists them).
DONE = 0
FAULT = 1
BAD_INPUT = 2
STOPPED = 75  # by a signal, with everything saved
INTERRUPTED = 130

E = TypeVar("E", bound=Exception)
FULL_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT)
MAX_MESSAGE_CHARS = 1000  # characters of a value, or of a list of them, in a message


@dataclass(frozen=True)
class Problem:
    """One mistake: what is wrong, the value seen, the value wanted, the key or file to change."""

    what: str
    saw: str
    want: str
    change: str

    def __str__(self) -> str:
        """On one line whatever the values are, without the secrets of URLs and without what a terminal would obey."""
        what = _show_text(self.what)
        saw = _show_text(self.saw)
        want = _show_text(self.want)
        return f"{what}: saw {saw}, want {want}; change {_show_text(self.change)}"


def _show_text(text: str) -> str:
    text = redact_text(text)  # before it is cut, so that no secret loses the sign by which it is known
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: MAX_MESSAGE_CHARS + 1])
    return shown if len(shown) <= MAX_MESSAGE_CHARS else f"{shown[:MAX_MESSAGE_CHARS]}..."


class UserError(Exception):
    """One or more problems that end the command with exit code 2 and no traceback."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


class RankUserError(UserError):
    """Mistakes that concern one rank alone, which must say so itself."""


class TrainingStopped(Exception):
    """The run itself went wrong (a loss that is not a number, a full disk): exit code 1, message, no traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(redact_text(message))


class RankTrainingStopped(TrainingStopped):
    """One rank alone cannot go on, so that it must say so itself: the others only see that it is gone."""


def mark_as_everyones(error: E, origin: int = 0) -> E:
    """Note that every rank raises this error together, and on which it arose: rank 0 alone says it."""
    error.__dict__["origin_of_all"] = origin
    return error


def find_origin_of_all(error: Exception) -> int | None:
    """The rank on which an error arose that every rank raises; None for one that may be of this rank alone."""
    return error.__dict__.get("origin_of_all")


def suggest_choice(word: str, choices: Iterable[str]) -> str:
    """What to want instead of a misspelt word: the closest choice, else all of them."""
    choices = sorted(choices)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"{close[0]!r} (the nearest valid one)" if close else "one of " + ", ".join(choices)


def format_value(value: object) -> str:
    """A value as a message shows it: on one line, and not too long."""
    text = redact_text(repr(value))  # before it is cut
    return text if len(text) <= 60 else f"{text[:57]}..."


def abbreviate_list(items: Sequence[str]) -> str:
    """The first three, and how many more there are."""
    more = f" and {len(items) - 3:,} more" if len(items) > 3 else ""
    return ", ".join(items[:3]) + more


def exception_message(error: BaseException) -> str:
    """What an exception says, on one line; the name of its class where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def iterate_causes(error: BaseException, *, implicit: bool = False) -> Iterator[BaseException]:
    """The error, the one that it was raised from, and so on.

    `implicit` follows those too that were being handled when the next one was raised.
    """
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or (cause.__context__ if implicit else None)


def problem_from_pydantic(key: str, error: Any, change: str) -> Problem:
    """One of pydantic's errors (a dict of ValidationError.errors()) about the value of `key`, in plain words."""
    want = error["msg"].removeprefix("Input should be ")
    match error["type"]:
        case "missing":
            return Problem(f"{key} is missing", "nothing", "a value", change)
        case "int_type" | "int_parsing" | "int_parsing_size" | "int_from_float":
            is_abbreviated = re.fullmatch(r"[\d._]+ *[A-Za-z]+", str(error["input"]))
            want = "a whole number, as in 5_000 or 1e4" if is_abbreviated else "a whole number"
        case "float_type" | "float_parsing":
            want = "a number"
        case "bool_type" | "bool_parsing":
            want = "true or false"
        case "string_type" | "path_type":
            want = "text"
        case "value_error":
            want = want.removeprefix("Value error, ")
        case "string_unicode":
            want = "text in UTF-8"
        case "string_pattern_mismatch":
            want = "a plain name, as in main-2"
        case "tuple_type":
            want = "a list, as in [a, b]"
        case "model_type" | "model_attributes_type":
            want = "a section of `key: value` lines"
    return Problem(f"{key} is not valid", format_value(error["input"]), want, change)


def problem_from_system(error: OSError) -> Problem | None:
    """What the system would not do with a file or a disk, in plain words; None of anything else, a fault of ours."""
    if error.errno in FULL_DISK_ERRORS:
        what = "a file cannot be written"
        want = "some free space" if error.errno == errno.ENOSPC else "some room in this user's quota"
    elif error.filename is not None and error.strerror:
        what = "a file or folder cannot be used"
        want = "one that is there, and that this user may read and write"
    else:
        return None
    place = str(error.filename or "what fills the disk, or where the file goes")
    return Problem(what, error.strerror or type(error).__name__, want, place)


def find_refusal(error: BaseException) -> Problem | None:
    """The same of any error: one of the system, or one behind which a library hides that the disk is full."""
    if isinstance(error, OSError):
        return problem_from_system(error)
    for cause in iterate_causes(error, implicit=True):
        if isinstance(cause, OSError) and cause.errno in FULL_DISK_ERRORS:
            return problem_from_system(cause)
    return None


def format_error(error: UserError | TrainingStopped) -> str:
    """The lines to print on stderr, one per problem."""
    return "\n".join(f"error: {line}" for line in str(error).splitlines())
