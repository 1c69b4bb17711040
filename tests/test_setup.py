"""launch/setup.sh: the environment that train.sh and tests/run.sh make."""

import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_an_environment_that_has_no_pip_is_completed(tmp_path: Path) -> None:
    """As Debian's python leaves one behind without python3-venv; the next start found it and failed for ever."""
    venv.create(tmp_path / ".venv", with_pip=False)
    script = f"set -euo pipefail; source {ROOT}/launch/setup.sh; make_environment {sys.executable}"
    subprocess.run(["bash", "-c", script], cwd=tmp_path, check=True)
    done = subprocess.run(
        [".venv/bin/python", "-m", "pip", "--version"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert str(tmp_path) in done.stdout, "its own"


def test_a_python_that_is_too_old_is_one_line(tmp_path: Path) -> None:
    for name in ("launch", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.10.9 || exit 1\n')
    old.chmod(0o755)
    script = "set -euo pipefail; source launch/setup.sh; setup"
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "PYTHON": str(old)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    line = "error: Python is too old or missing: saw Python 3.10.9, want 3.11 or newer; change the PYTHON environment "
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{line}variable to a newer one\n")
