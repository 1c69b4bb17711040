"""README.md: one screen that says what it is and where it stands, and links; its numbers are those of the pages."""

import re
import subprocess
from pathlib import Path

import pytest

from smoltrain.config.load import list_recipes

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SITE = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LARGEST_KB = 400
NOT_TASKS = {"README.md"}  # of docs/: the site's own first page


def said_of(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def test_it_is_a_screen_and_links():
    assert len(README.splitlines()) <= 120


def test_what_a_reader_looks_for_comes_in_this_order():
    marks = [
        "Pretrains small language models", "has never run on a GPU", "git clone", "\n./train.sh  ", "\n./train.sh smol",
        "data.path=input.txt", "| what | measured", "![", "\nsmoltrain/ ",
    ]  # fmt: skip
    places = [README.find(mark) for mark in marks]
    assert -1 not in places
    assert places == sorted(places)


@pytest.mark.parametrize("page", ["README.md", "docs/README.md"])
def test_where_it_stands_is_said_first(page: str):
    first, _, _ = said_of(page).partition("\n```")
    assert "never run on a GPU" in first
    assert "clusters.md#what-has-not-run" in first
    assert "## What has not run" in said_of("docs/clusters.md")


@pytest.mark.parametrize(
    ("number", "page", "as_there"),
    [
        ("loss 3.88 nats", "smoltrain/recipes/quickstart.yaml", "validation 3.88 nats per token after 300 steps"),
        ("in 90 s", "smoltrain/recipes/quickstart.yaml", "1.5 minutes on two cores"),
        ("loss 4.75 nats", "docs/results/shakespeare-80m.md", "4.7474"),
        ("in 2.13 hours", "docs/results/shakespeare-80m.md", "2.13 hours"),
        ("1.55 times", "docs/performance.md", "| 368 | **1.55** |"),
        ("1.19 on an Intel", "docs/performance.md", "On an Intel Xeon of 161 GFLOP/s in bf16\nthe ratios are 1.19"),
        ("1.31 times", "docs/performance.md", "1.55 and 1.31 reached"),
        ("25 % of its steps", "docs/results/time-to-loss.md", "**40 (25 %)**"),
        ("33 % of its time", "docs/results/time-to-loss.md", "**8.3 (33 %)**"),
        ("SmolLM2-135M's shapes", "docs/results/time-to-loss.md", "**20 (40 %)** | 40,960 | 11.8 | **236 (54 %)**"),
        ("kill -9", "docs/results/nothing-lost.md", "bitwise those of a run that nobody killed"),
    ],
)
def test_a_result_is_that_of_the_page_it_links(number: str, page: str, as_there: str):
    (row,) = [line for line in README.splitlines() if line.startswith("| ") and number in line]
    assert as_there in said_of(page)
    linked = re.findall(r"\]\((docs/[^)]+)\)", row)
    assert linked == [page] or "quickstart" in row


def test_the_table_says_what_it_was_measured_on():
    assert "| measured on two CPU cores |" in README


@pytest.mark.parametrize("text", [README, SITE], ids=["README.md", "docs/README.md"])
def test_every_page_of_docs_is_linked(text: str):
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - NOT_TASKS
    linked = {Path(link).name for link in re.findall(r"\]\(([\w/.-]+\.md)\)", text)}
    assert pages - linked == set()


@pytest.mark.parametrize("name", ["CHANGELOG.md", "CONTRIBUTING.md", "docs/decisions.md", "LICENSE"])
def test_a_page_is_linked_and_there(name: str):
    assert f"]({name})" in README
    assert (ROOT / name).stat().st_size > 0


def test_what_lies_where_is_there():
    (tree,) = [text for kind, text in FENCE.findall(README) if not kind]
    names = re.findall(r"^(\S+)  ", tree, re.MULTILINE)
    assert {"train.sh", "smoltrain/", "examples/", "tests/", "docs/"} <= set(names)
    assert [name for name in names if name != "runs/" and not (ROOT / name).exists()] == []
    paths = re.findall(r"(?:smoltrain|docs|tests)/[\w./]+", tree)
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_picture_shows_what_its_text_says():
    """It was drawn by `smoltrain plot`, whose loss.png has losses and phases, and no learning rate."""
    (words,) = re.findall(r"^!\[(.*)\]\(docs/images/quickstart.png\)$", README, re.MULTILINE)
    assert "learning rate" not in words
    assert words.startswith("Training and validation loss")


def test_the_recipes_it_names_are_shipped():
    named = set(re.findall(r"`(quickstart|shakespeare-80m|smol[\w-]+)`|train\.sh (\w[\w-]*)", README))
    assert {name for pair in named for name in pair if name} <= set(list_recipes())


# --- what is shipped


def list_tracked_files() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    git = ["git", "-c", "safe.directory=*", "-C", str(ROOT), "ls-files", "-z"]
    names = subprocess.run(git, capture_output=True, text=True, check=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def test_no_tracked_file_is_large():
    files = list_tracked_files()
    assert ROOT / "README.md" in files
    assert [path for path in files if path.stat().st_size > LARGEST_KB * 1000] == []


def test_no_tracked_file_is_half_merged():
    marks = tuple(mark * 7 + b" " for mark in (b"<", b">"))  # not as git writes them, so that this file has none
    lines = [(path, line) for path in list_tracked_files() for line in path.read_bytes().splitlines()]
    assert [(path.name, line) for path, line in lines if line.startswith(marks)] == []
