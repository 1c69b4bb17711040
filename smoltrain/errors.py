"""The one form in which smoltrain reports a mistake that its user can mend."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

# Exit codes of every entry point (docs: README, "Exit codes").
DONE, FAULT, BAD_INPUT, STOPPED = 0, 1, 2, 75


@dataclass(frozen=True)
class Problem:
    """One mistake: what is wrong, the value seen, the value wanted, the key or file to change."""

    what: str
    saw: str
    want: str
    change: str

    def __str__(self) -> str:
        return f"{self.what}: saw {self.saw}, want {self.want}; change {self.change}"


class UserError(Exception):
    """One or more problems that end the command with exit code 2 and no traceback."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


class TrainingStopped(Exception):
    """The run itself went wrong (a loss that is not a number, a full disk): exit code 1, message, no traceback."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """What to want instead of `word`: the closest choice first, else all of them."""
    choices = sorted(choices)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"{close[0]!r} (the nearest valid one)" if close else "one of " + ", ".join(choices)


def report(error: UserError | TrainingStopped) -> str:
    """The lines to print on stderr, one per problem."""
    return "\n".join(f"error: {line}" for line in str(error).splitlines())
