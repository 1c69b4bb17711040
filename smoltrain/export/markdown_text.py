"""Text that a model, a file or a stranger has written, as Markdown that shows it and does nothing else."""

import re

MARKUP = re.compile(r"([\\`*_{}\[\]()#!|<>~&$])")


def escape_markdown(text: str) -> str:
    """In a line or a cell of a table: every character of markup escaped, line ends as spaces."""
    return MARKUP.sub(r"\\\1", " ".join(text.split()))


def quote_code(text: str) -> str:
    """A code span in a line or a cell of a table, however many backticks and bars there are in it."""
    text = " ".join(text.split()).replace("|", "\\|")
    fence = "`" * (1 + _longest_run(text))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def fence_code(text: str) -> str:
    """A block of code that nothing in the text can close."""
    fence = "`" * max(3, 1 + _longest_run(text))
    return f"{fence}text\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
