"""Findings as lines and as JSON, and the exit code."""

import json

import pytest

from smoltrain.doctor.check import Check, Finding
from smoltrain.doctor.report import run_and_print_checks

WELL = Check("python", lambda: Finding("ok", "3.11"))
ODD = Check("threads", lambda: Finding("warning", "too many", "unset it"))
BROKEN = Check("disk", lambda: Finding("fault", "full", "free some space"))


def noisy() -> Finding:
    print("a library says something")
    return Finding("ok", "quiet")


@pytest.mark.parametrize(("checks", "code"), [([WELL], 0), ([WELL, ODD], 0), ([WELL, ODD, BROKEN], 1)])
def test_only_a_fault_ends_with_1(checks: list[Check], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_and_print_checks(checks, as_json=False) == code
    out = capsys.readouterr().out
    assert out.startswith("ok       python           3.11\n")
    assert out.splitlines()[-1] == {
        1: "1 ok", 2: "1 warning, 1 ok", 3: "1 fault, 1 warning, 1 ok",
    }[len(checks)]  # fmt: skip
    assert ("fault    disk             full\n                          -> free some space\n" in out) == bool(code)


def test_json_is_all_that_stands_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_and_print_checks([Check("noise", noisy), BROKEN], as_json=True) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == {
        "fault": True,
        "findings": [
            {"check": "noise", "status": "ok", "saw": "quiet", "advice": ""},
            {"check": "disk", "status": "fault", "saw": "full", "advice": "free some space"},
        ],
    }
    assert err == "a library says something\n"
