"""docs/config.md, the reference of every key of a recipe, written from the schema.

`.venv/bin/python docs/config_reference.py` writes it anew. tests/test_explain.py compares it with the schema.
"""

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from smoltrain.checkpoint.identity import key_rule
from smoltrain.config.reference import REQUIRED, KeyReference, SectionReference, read_sections
from smoltrain.explain import RESUME_WORDS

PAGE = Path(__file__).parent / "config.md"
COLUMNS = 100
HEAD = """\
Every key that a recipe may have, by section. `smoltrain explain KEY` tells the same in a terminal, and what the shipped
recipes set the key to; `smoltrain show RECIPE --comments` writes it above each line of a recipe. On the command line
`section.key=value` takes the place of the recipe's value; an item of `phases` and of `data.sources` is addressed by its
name, as in `phases.main.lr=1e-3`. Whole numbers are at most 2,147,483,647 unless more is said."""


def write_page() -> str:
    """The page: a table for each section."""
    return "\n".join(_write_lines()) + "\n"


def _write_lines() -> Iterator[str]:
    yield "# Keys of a recipe"
    yield ""
    yield "<!-- Generated from smoltrain/config/schema.py: .venv/bin/python docs/config_reference.py -->"
    yield ""
    yield from _wrap(HEAD)
    yield ""
    yield "The last column says whether a key may change when a run is resumed:"
    yield ""
    yield from (f"- **{word}**: {sentence}." for word, sentence in RESUME_WORDS.values())
    for section in read_sections().values():
        yield from _write_section(section)


def _write_section(section: SectionReference) -> Iterator[str]:
    yield ""
    yield f"## {section.name}"
    yield ""
    yield from _wrap(_quote_code(section.text))
    yield ""
    yield "| key | type | default | meaning | resume |"
    yield "|---|---|---|---|---|"
    yield from (_write_row(key) for key in section.keys if not key.is_inherited)
    inherited = [f"`{key.leaf}`" for key in section.keys if key.is_inherited]
    if inherited:
        yield ""
        yield from _wrap(f"And, as in `data`, for this source alone: {', '.join(inherited)}.")


def _write_row(key: KeyReference) -> str:
    default = key.default if key.default == REQUIRED else f"`{key.default}`"
    resume = RESUME_WORDS[key_rule(key.key)][0]
    cells = [f"`{key.leaf}`", key.type, default, _quote_code(key.meaning), resume]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _quote_code(text: str) -> str:
    """The text with words in backticks that Markdown would take for emphasis or a tag: those that hold _, * or <."""
    parts = re.split(r"(`[^`]*`)", text)  # what is in backticks already stands at the odd places
    plain = [re.sub(r"[\w./<-]*[_*<][\w.*/<>|-]*\w|(?<= )_(?= )", r"`\g<0>`", part) for part in parts[::2]]
    return "".join(word for pair in zip(plain, [*parts[1::2], ""], strict=True) for word in pair)


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), COLUMNS, break_on_hyphens=False, break_long_words=False)


if __name__ == "__main__":
    PAGE.write_text(write_page(), encoding="utf-8")
