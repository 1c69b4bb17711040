"""Checks that answer, raise or hang: each becomes a finding, and the next one is run."""

import os
from pathlib import Path

import pytest

from smoltrain.doctor.check import Check, Finding, run_check, worst_finding
from smoltrain.errors import Problem, UserError

WELL = Finding("ok", "well")
ODD = Finding("warning", "odd", "look")
BROKEN = Finding("fault", "broken", "mend")


def test_a_check_that_hangs_is_left_behind(tmp_path: Path) -> None:
    """Opening a pipe that nobody writes into never returns, as a dead network disk would not."""
    os.mkfifo(tmp_path / "pipe")
    found = run_check(Check("disk", lambda: Finding("ok", (tmp_path / "pipe").read_text()), limit_s=0.1))
    assert (found.status, found.saw[:21]) == ("fault", "no answer within 0.1 ")
    os.close(os.open(tmp_path / "pipe", os.O_RDWR | os.O_NONBLOCK))  # which lets the thread go


def test_what_a_check_raises_is_a_finding() -> None:
    def mistaken() -> Finding:
        raise UserError(Problem("no tokenizer", "https://me:secret@x/y", "one", "tokenizer.name"))

    def unforeseen() -> Finding:
        raise PermissionError(13, "Permission denied", "/sys/x")

    assert run_check(Check("tokenizer", mistaken)) == Finding(
        "fault", "no tokenizer: https://REDACTED@x/y", "one; change tokenizer.name"
    )
    found = run_check(Check("clocks", unforeseen))
    assert (found.status, found.saw) == (
        "warning", "could not be looked at: PermissionError: [Errno 13] Permission denied: '/sys/x'"
    )  # fmt: skip


def test_of_several_findings_the_worst_counts_and_all_that_is_wrong_is_said() -> None:
    assert worst_finding([WELL, ODD, BROKEN]) == Finding("fault", "odd; broken", "look; mend")
    assert worst_finding([WELL, ODD]) == ODD
    assert worst_finding([WELL, WELL]) == Finding("ok", "well; well")


def test_whatever_is_wrong_has_an_advice() -> None:
    with pytest.raises(AssertionError):
        Finding("warning", "odd")
