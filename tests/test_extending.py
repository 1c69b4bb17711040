"""docs/extending.md: each worked example, applied to a copy of the tree, works as the page says."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

LOAD = "import sys; from smoltrain.config.load import load_config; load_config(sys.argv[1], sys.argv[2:])"


def fenced(title: str, kind: str) -> list[str]:
    """The blocks of one kind under `## title`, in order."""
    _, there, rest = PAGE.partition(f"\n## {title}\n")
    assert there, f"no section {title!r}"
    return [text for found, text in FENCE.findall(rest.partition("\n## ")[0]) if found == kind]


pytestmark = pytest.mark.slow


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the package, of the tests and of what they start, to be changed."""
    for name in ("smoltrain", "tests", "docs", "launch"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def run(words: list[str], tree: Path, text: str | None = None) -> str:
    """Run a command in the copy, whose smoltrain comes before any installed one; its output."""
    environment = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run(words, cwd=tree, env=environment, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def apply_diffs(title: str, tree: Path) -> None:
    """Make the changes of a section; the places are found by their context, not by line numbers."""
    for diff in fenced(title, "diff"):
        run(["git", "apply", "--recount", "-"], tree, diff)


def commands(title: str) -> list[list[str]]:
    return [shlex.split(line) for block in fenced(title, "sh") for line in block.splitlines()]


def test_a_schedule(tree: Path):
    title = "A learning-rate schedule"
    apply_diffs(title, tree)
    (code,) = fenced(title, "python")
    with (tree / "tests" / "test_schedule.py").open("a", encoding="utf-8") as file:
        file.write(f"\n\n{code}")
    done = run([sys.executable, "-m", "pytest", "-q", "tests/test_schedule.py", "-k", "quadratic or schema"], tree)
    assert "2 passed" in done
    show, train = commands(title)
    assert "quadratic" in run([sys.executable, "-m", *show], tree)
    assert train[0] == "./train.sh"
    run([sys.executable, "-c", LOAD, *train[1:]], tree)  # its words are those of a valid recipe


def test_a_data_format(tree: Path):
    title = "A data format"
    (code,) = fenced(title, "python")
    file = tree / "tests" / "data" / "documents" / "test_read_tsv.py"
    file.write_text(code, encoding="utf-8")
    words = [sys.executable, "-m", "pytest", "-q", str(file.relative_to(tree))]
    with pytest.raises(AssertionError, match="3 failed"):
        run(words, tree)  # without the change the test fails, so that it is one
    apply_diffs(title, tree)
    assert "3 passed" in run(words, tree)
    ((_, *train),) = commands(title)
    run([sys.executable, "-c", LOAD, *train], tree)


@pytest.mark.timeout(900)
def test_an_optimizer(tree: Path):
    title = "An optimizer"
    (code,) = fenced(title, "python")
    file = tree / "tests" / "engine" / "test_lion.py"
    file.write_text(code, encoding="utf-8")
    words = [sys.executable, "-m", "pytest", "-q", str(file.relative_to(tree))]
    with pytest.raises(AssertionError, match="5 failed"):
        run(words, tree)  # without the change the test fails, so that it is one
    apply_diffs(title, tree)
    assert "5 passed" in run(words, tree)
    train, estimate = commands(title)
    run([sys.executable, "-c", LOAD, *train[1:]], tree)
    assert "GiB" in run([sys.executable, "-m", *estimate], tree)


def test_a_metric(tree: Path):
    title = "A metric"
    (code,) = fenced(title, "python")
    with (tree / "tests" / "run" / "test_track.py").open("a", encoding="utf-8") as file:
        file.write(f"\n\n{code}")
    apply_diffs(title, tree)
    words = [sys.executable, "-m", "pytest", "-q", "tests/run/test_track.py", "-k", "targets or listed"]
    assert "passed" in run(words, tree)


def test_an_activation(tree: Path):
    title = "An activation"
    layers, exported, schema = fenced(title, "diff")
    file = "tests/export/test_modeling_smoltrain.py"
    words = [sys.executable, "-m", "pytest", "-q", file, "-k", "each_mlp"]
    for diff in (layers, schema):
        run(["git", "apply", "--recount", "-"], tree, diff)
    with pytest.raises(AssertionError, match="1 failed, 2 passed"):
        run(words, tree)  # half of the change
    run(["git", "apply", "--recount", "-"], tree, exported)
    assert "3 passed" in run(words, tree)
    show, train = commands(title)
    assert "mlp: relu2" in run([sys.executable, "-m", *show], tree)
    run([sys.executable, "-c", LOAD, *train[1:]], tree)
