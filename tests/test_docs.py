"""The pages of docs/ and CONTRIBUTING.md: short lines, links that lead somewhere, names that exist."""

import ast
import re
from collections.abc import Callable, Collection
from pathlib import Path

from smoltrain.run.track import METRICS

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
# Words of the field that a reader will grep for, and that the glossary must therefore have.
FIELD = [
    "gradient accumulation", "micro-batch", "all-reduce", "reduce-scatter", "shard", "prefetch", "broadcast",
    "world size", "row", "phase", "ledger",
]  # fmt: skip
EXAMPLES = {  # files that docs/extending.md makes
    "smoltrain/data/documents/read_tsv.py", "tests/data/documents/test_read_tsv.py", "tests/engine/test_lion.py",
}  # fmt: skip
HISTORY = {"CHANGELOG.md", "docs/decisions.md"}  # may speak of files that are gone


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def find_faults(find: Callable[[Path], list[str]], but: Collection[str] = ()) -> dict[str, list[str]]:
    """What `find` finds on each page on which there is something."""
    faults = {name_of(page): find(page) for page in PAGES if name_of(page) not in but}
    return {name: found for name, found in faults.items() if found}


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def without_fences(text: str) -> str:
    return FENCE.sub("", text)


def long_lines(page: Path) -> list[str]:
    """100 columns; a row of a table cannot be wrapped, output is shown as it was, and some words have no gap."""
    text = page.read_text(encoding="utf-8")
    commands = "\n".join(body for _, kind, body in FENCE.findall(text) if kind)
    lines = [line for line in without_fences(text).splitlines() if not line.startswith("|")]
    lines += [] if name_of(page) == "docs/extending.md" else commands.splitlines()  # its code is that of the tree
    return [line for line in lines if len(line) > 100 and " " in line.strip()]


def test_lines_are_short():
    assert find_faults(long_lines) == {}


def broken_links(page: Path) -> list[str]:
    links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", without_fences(page.read_text(encoding="utf-8")))
    local = [link for link in links if "://" not in link]
    return [link for link in local if not (page.parent / link).exists()]


def test_links_lead_to_files():
    assert find_faults(broken_links) == {}


def missing_places(text: str) -> list[str]:
    """`path.py: name`s of which the file, or the name in it, does not exist; paths may leave out smoltrain/."""
    missing = []
    for path, name in re.findall(r"`([\w/]+\.py): ([\w.]+)`", text):
        file = ROOT / path if (ROOT / path).is_file() else ROOT / "smoltrain" / path
        if not file.is_file() or name not in names_in(file):
            missing.append(f"{path}: {name}")
    return missing


def names_in(file: Path) -> set[str]:
    """Functions, classes, methods (as Class.method) and constants of a file."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def test_places_in_the_code_exist():
    assert find_faults(lambda page: missing_places(page.read_text(encoding="utf-8"))) == {}


def test_a_place_that_is_gone_is_found():
    page = "`schedule.py: Plan.lr` `schedule.py: SCHEDULES` `schedule.py: Plan.rate` `no/such.py: name`"
    assert missing_places(page) == ["schedule.py: Plan.rate", "no/such.py: name"]


def test_what_the_arrows_name_is_in_the_files():
    """Each step of the line is defined where the line says, and what stands before it calls it or starts it."""
    arrows = re.findall(r"^  -> (smoltrain/\S+\.py): (\w+)", text_of("docs/architecture.md"), re.MULTILINE)
    assert len(arrows) >= 5
    before = (ROOT / "train.sh").read_text(encoding="utf-8")
    for path, name in arrows:
        source = (ROOT / path).read_text(encoding="utf-8")
        assert f"def {name}(" in source, f"{path} has no {name}"
        module = path.removesuffix(".py").replace("/", ".")
        assert any(way in before for way in (f"{name}(", module, "smoltrain train")), f"{name} is not called"
        before = source
    assert "\nMETRICS = {" in (ROOT / "smoltrain" / "run" / "track.py").read_text(encoding="utf-8")


def test_the_map_follows_a_row_a_gradient_and_a_checkpoint():
    ways = text_of("docs/architecture.md").split("\n## ")[1:]
    assert [way.splitlines()[0].split()[-1] for way in ways] == ["loss", "gradient", "checkpoint"]
    for way in ways:
        rows = [line for line in way.splitlines() if line.startswith("| `")]
        assert len(rows) >= 8
        assert all(re.match(r"\| `[\w/]+\.py: [\w.]+` \| .+ \|$", row) for row in rows)


def missing_files(page: Path) -> list[str]:
    """`smoltrain/run/track.py`, `tests/model/`; under smoltrain/ also without it, as in `run/track.py`."""
    quoted = re.findall(r"`([\w.*/-]+)`", without_fences(page.read_text(encoding="utf-8")))
    folders = {path.name for root in (ROOT, ROOT / "smoltrain") for path in root.iterdir() if path.is_dir()} - {"runs"}
    paths = [word for word in quoted if word.partition("/")[0] in folders and "/" in word]
    paths += [word for word in quoted if word.endswith(".py") and "/" not in word]
    roots = [ROOT, ROOT / "smoltrain", page.parent]
    known = [path for path in paths if any(list(root.glob(path)) for root in roots)]
    known += [path for path in paths if "/" not in path and list((ROOT / "smoltrain").rglob(path))]
    others = {
        path
        for path in paths
        if path in METRICS or re.fullmatch(r"data/(\w+/NAME|[\w-]+\.jsonl?)|evaluation/TASK/METRIC|c\d\d_\w+\.py", path)
    }
    return sorted(set(paths) - set(known) - others - EXAMPLES)


def test_files_of_the_project_exist():
    assert find_faults(missing_files, HISTORY) == {}, "no metric, and no file of a run or of a trial"


def missing_tests(page: Path) -> list[str]:
    """`run/test_track.py::test_a`, below tests/; `::test_b` after it is in the same file."""
    missing, file = [], ""
    for path, name in re.findall(r"([\w/]*test_\w+\.py)?(?:::(test_\w+))?", page.read_text(encoding="utf-8")):
        file = path.removeprefix("tests/") or file
        if f"tests/{file}" in EXAMPLES:
            continue
        if path and not (ROOT / "tests" / file).is_file():
            missing.append(path)
        elif name and f"def {name}(" not in (ROOT / "tests" / file).read_text(encoding="utf-8"):
            missing.append(f"{file}::{name}")
    return missing


def test_tests_that_are_named_exist():
    assert find_faults(missing_tests, HISTORY) == {}


def test_the_glossary_has_the_words_of_the_field_and_at_most_forty():
    rows = re.findall(r"^\| ([^|`]+) \| .+ \|$", text_of("CONTRIBUTING.md").partition("## Words")[2], re.MULTILINE)
    words = [word for row in rows[1:] for word in row.split(", ")]
    assert len(words) == len(set(words)) <= 40
    assert set(FIELD) <= set(words)
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "smoltrain").rglob("*.py")).lower()
    assert [word for word in FIELD if word not in source] == [], "a word that the code does not use"
