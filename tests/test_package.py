"""`import smoltrain`: every name is there, documented and typed, and the import itself costs nothing."""

import inspect
import json
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

import smoltrain
from smoltrain.library.training import train

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", smoltrain.__all__)
def test_every_name_of_all_is_there_and_documented(name: str) -> None:
    value = getattr(smoltrain, name)
    assert inspect.getdoc(value)
    assert set(dir(smoltrain)) == {*smoltrain.__all__, "__version__"}, "what a notebook completes"
    if inspect.isclass(value):
        members = [getattr(value, member) for member in vars(value) if not member.startswith(("_", "model_"))]
        assert all(inspect.getdoc(member) for member in members)


def test_a_name_that_is_none_is_said_so() -> None:
    with pytest.raises(AttributeError, match="'smoltrain' has no attribute 'trian'"):
        smoltrain.trian  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_train_says_how_it_is_called() -> None:
    assert smoltrain.train is train
    assert "callbacks: Each is called after every step" in pydoc.render_doc(smoltrain.train)


def test_the_import_is_cheap() -> None:
    script = "import json, sys, smoltrain; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(json.loads(done.stdout))
    assert {name for name in loaded if name.startswith("smoltrain.")} == {"smoltrain.openmp", "smoltrain.version"}
    assert not loaded & {"torch", "numpy", "pydantic", "rich", "yaml"}
