"""OpenMP's threads wait as smoltrain/openmp.py has it, wherever torch is loaded by the product."""

import os
import subprocess
import sys

import pytest

from smoltrain.errors import BAD_INPUT
from smoltrain.launch.rank import run_rank
from smoltrain.openmp import WAITING, choose_waiting

FIRST_USE = """
import os, sys, smoltrain
before = dict(os.environ)
smoltrain.Model
assert "torch" in sys.modules
assert dict(os.environ) == before
"""


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that says nothing of waiting."""
    for variable in WAITING:
        monkeypatch.delenv(variable, raising=False)
    return monkeypatch


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings GNU's OpenMP on Linux")
def test_openmp_itself_says_that_it_waits_so(unset: pytest.MonkeyPatch) -> None:
    environment = os.environ | {"OMP_DISPLAY_ENV": "verbose"}
    said = subprocess.run(
        [sys.executable, "-c", FIRST_USE], check=False, env=environment, capture_output=True, text=True
    )
    assert said.returncode == 0, said.stderr
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in said.stderr
    assert "GOMP_SPINCOUNT = '3000'" in said.stderr


def test_a_rank_waits_so(unset: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    for variable in WAITING:  # which are taken back after the test
        unset.setenv(variable, "")
        unset.delenv(variable)
    assert run_rank(["no-such-recipe"]) == BAD_INPUT
    assert {name: os.environ.get(name) for name in WAITING} == WAITING


@pytest.mark.parametrize("variable", WAITING)
def test_what_the_user_has_set_wins(unset: pytest.MonkeyPatch, variable: str) -> None:
    assert choose_waiting() == WAITING
    unset.setenv(variable, "ACTIVE")
    assert choose_waiting() == {}
