"""Both ends of the version bounds in pyproject.toml: in environments made for it, smoltrain trains, resumes, exports.

An end of torch costs gigabytes, and even the lowest versions of all the other libraries, beside this environment's
torch and DeepSpeed, a minute of processor time: all of them are `long`. Their environments are made by uv.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import tiny

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BORROWED = ("torch", "deepspeed")
VERSIONS = """
import importlib.metadata, json, sys
print(json.dumps({name: importlib.metadata.version(name) for name in sys.argv[1:]}))
"""
LOWEST = ("--resolution", "lowest-direct")  # of what pyproject.toml names; what that asks for is as new as can be
ENDS = {  # Python, and what is asked for beside the project
    "lowest": ("3.11", LOWEST),
    "a GPU machine's": ("3.12", ("torch==2.11.0", "transformers==5.17.0")),
    "newest": ("3.13", ()),
}
SUITES = ("kernels", "model", "engine", "training", "export", "inference", "evaluation", "library")  # folders of tests/


def lower_bounds(requirements: list[str]) -> dict[str, str]:
    """Library -> the lowest version that is asked for."""
    found = {}
    for requirement in requirements:
        match = re.match(r"([\w.-]+)(\[[\w,]+\])?>=([\d.]+)", requirement)
        assert match, f"{requirement} has no lower bound"
        found[match[1]] = match[3]
    return found


def find_python(version: str) -> str:
    """An interpreter of this version; the shims of pyenv refuse versions that are not chosen."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    named = shutil.which(f"python{version}")
    for candidate in [*([named] if named else []), *map(str, root.glob(f"versions/{version}.*/bin/python"))]:
        told = subprocess.run([candidate, "--version"], capture_output=True, text=True, check=False)
        if told.returncode == 0 and f" {version}." in told.stdout:
            return candidate
    pytest.skip(f"no Python {version} here")


def install(python: Path, *words: str) -> None:
    """By uv, which can be asked for lowest versions; from packages, not from wheels of this machine."""
    command = [sys.executable, "-m", "uv", "pip", "install", "--python", str(python), "--quiet", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"DS_BUILD_OPS": "0"})
    assert done.returncode == 0, done.stderr


def run(python: Path, folder: Path, *words: str) -> str:
    done = subprocess.run(
        [python, *words], cwd=folder, capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_MODULES_CACHE": str(folder / "modules")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def assert_trains(python: Path, folder: Path, ranks: int) -> None:
    """A tiny run through its two phases in two commands, what it left, and its model elsewhere."""
    smoltrain = (python, folder, "-m", "smoltrain")
    words = ["quickstart", *tiny.words(folder, "track.wandb=offline"), "--ranks", str(ranks)]
    run(*smoltrain, "train", *words, "run.stop_after=main")
    assert "done: 12 of 12 steps" in run(*smoltrain, "train", *words)
    run(*smoltrain, "verify", "quickstart")
    assert "transformers alone gives the same logits" in run(*smoltrain, "export", "quickstart", "out")
    assert run(*smoltrain, "generate", "quickstart", "--prompt", "the king").startswith("the king")
    assert list(folder.glob("runs/quickstart/wandb/offline-run-*"))
    assert (folder / "runs/quickstart/plots/training.png").stat().st_size > 10_000


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[Path]:
    """Where a test makes its environment; pytest would keep gigabytes for three runs."""
    folder = tmp_path / "environment"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)  # a test that was skipped has made none


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_lowest_versions_of_all_but_torch_train_and_export(tmp_path: Path, environment: Path) -> None:
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    bounds = lower_bounds(PROJECT["dependencies"])
    lowest = {name: version for name, version in bounds.items() if name not in BORROWED}
    install(python, *LOWEST, *(line for line in PROJECT["dependencies"] if not line.startswith(BORROWED)))
    (site,) = environment.glob("lib/*/site-packages")
    (site / "libraries.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")  # comes last on the path
    versions = json.loads(run(python, tmp_path, "-c", VERSIONS, *lowest))
    for name, version in versions.items():
        assert version.startswith(lowest[name]), name
    assert_trains(python, tmp_path, ranks=1)


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("end", ENDS)
def test_both_ends_train_and_pass_the_tests_of_what_they_compute(tmp_path: Path, environment: Path, end: str) -> None:
    version, asked = ENDS[end]
    subprocess.run([find_python(version), "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    install(python, f"{ROOT}[dev]", *asked)
    assert_trains(python, tmp_path, ranks=2)
    suites = [str(ROOT / "tests" / name) for name in SUITES]
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow and not long and not gpu"]
    words += ["-W", "ignore::DeprecationWarning"]  # old libraries call newer ones by names that these have given up
    print(end, run(python, ROOT, *words, *suites).splitlines()[-1])


def test_the_suites_that_both_ends_run_are_there() -> None:
    for name in SUITES:
        assert list((ROOT / "tests" / name).glob("test_*.py")), name


@pytest.mark.slow
def test_the_tested_versions_install_on_the_lowest_python_there_is() -> None:
    """Debian 12 has Python 3.11.2, and some packages ask for a later 3.11."""
    [lowest] = re.findall(r"^>=(\d+\.\d+)$", PROJECT["requires-python"])
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--python-version", f"{lowest}.0"]
    command += ["--extra", "dev", "-c", "constraints.txt", "pyproject.toml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_each_requirement_has_a_lower_bound_and_the_tested_versions_are_above_it() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = dict(line.split("==") for line in lines if "==" in line)
    tested = {name.lower().replace("-", "_"): version for name, version in tested.items()}
    for name, lowest in lower_bounds(PROJECT["dependencies"]).items():
        numbers = [
            tuple(map(int, re.findall(r"\d+", text))) for text in (lowest, tested[name.lower().replace("-", "_")])
        ]
        assert numbers[0] <= numbers[1], name
