"""Each measurement is a command: its help, its errors, what heads its JSON, and the commands that are printed."""

import ast
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from benchmarks import attention, checkpoint, command, data, loss, time_to_loss, train
from smoltrain.cli import run_app

ROOT = Path(__file__).parent.parent.parent
APPS = {module.__name__: module.app for module in (attention, checkpoint, data, loss, time_to_loss, train)}
PRINTED = sorted(
    {
        line.partition("#")[0].strip()
        for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
        for line in path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
        if line.strip().startswith("python -m benchmarks.")
    }
)


@pytest.mark.parametrize("printed", PRINTED)
def test_a_printed_command_is_valid(printed: str):
    _, _, module, *words = shlex.split(printed)
    app = typer.main.get_command(APPS[module])
    words = [word for word in words if word != "RECIPE"] + ["quickstart"] * ("RECIPE" in words)
    app.make_context(module, words)


def test_there_are_printed_commands():
    assert {"benchmarks.train", "benchmarks.attention", "benchmarks.loss"} <= {line.split()[2] for line in PRINTED}


@pytest.mark.parametrize("module", APPS)
def test_help_says_what_is_measured_and_gives_an_example_that_is_valid(
    module: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as left:
        run_app(APPS[module], ["--help"])
    out = capsys.readouterr().out
    assert not left.value.code
    assert "Measure " in out
    assert "Errors:" not in out
    assert "--out" in out
    example = next(line for line in out.splitlines() if "Example: python -m " in line).partition("Example: ")[2]
    _, _, named, *words = shlex.split(example.strip(" │"))
    assert named == module
    typer.main.get_command(APPS[module]).make_context(module, words)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["no-such-recipe"], "error: no such recipe"),
        (["quickstart", "model.hidden_sise=8"], "error: "),
        (["quickstart", "--rounds", "0"], "error: --rounds is not valid: saw '0'"),
    ],
)
def test_a_mistake_of_the_user_has_code_2_and_no_traceback(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as left:
        run_app(attention.app, words)
    err = capsys.readouterr().err
    assert left.value.code == 2
    assert says in err
    assert "Traceback" not in err


def test_a_process_of_its_own_behaves_the_same():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.train", "quickstart", "--steps", "5"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: too few steps to measure: saw 5, want 6 or more")
    assert done.stderr.count("\n") == 1


def test_the_command_stands_in_the_head_as_it_was_given(monkeypatch: pytest.MonkeyPatch):
    given = [str(ROOT / "benchmarks" / "loss.py"), "quickstart", "run.name=a b"]
    monkeypatch.setattr(sys, "argv", given)
    head = command.describe_benchmark({"rounds": 3}, ("rich",))
    assert head["command"] == "python -m benchmarks.loss quickstart 'run.name=a b'"
    assert head["settings"] == {"rounds": 3}
    assert {"smoltrain", "torch", "numpy", "rich", "python"} == head["versions"].keys()


def test_the_package_knows_nothing_of_its_benchmarks():
    for path in (ROOT / "smoltrain").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "benchmarks" for name in names), path
