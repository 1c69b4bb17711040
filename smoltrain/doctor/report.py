"""Findings in print: a line each as they come, or all of them as JSON."""

import contextlib
import json
import sys
from collections.abc import Sequence
from typing import NamedTuple

from smoltrain.doctor.check import Check, Finding, run_check
from smoltrain.errors import DONE, FAULT
from smoltrain.terminal import print_text, show_activity

STYLES = {"ok": "", "warning": "yellow", "fault": "bold red"}
STATUS_WIDTH = 8
NAME_WIDTH = 16


class NamedFinding(NamedTuple):
    """What the check of this name has found."""

    name: str
    finding: Finding


def run_and_print_checks(checks: Sequence[Check], *, as_json: bool) -> int:
    """Run one after the other and print; the exit code, which a fault makes 1."""
    found: list[NamedFinding] = []
    for check in checks:
        if as_json:
            with contextlib.redirect_stdout(sys.stderr):  # what a library prints is not part of the JSON
                found.append(NamedFinding(check.name, run_check(check)))
            continue
        with show_activity(check.name):
            finding = run_check(check)
        found.append(NamedFinding(check.name, finding))
        print_finding(found[-1])
    print_verdict(found, as_json=as_json)
    return exit_code_of(found)


def exit_code_of(found: Sequence[NamedFinding]) -> int:
    """1 after a fault."""
    return FAULT if any(finding.status == "fault" for _, finding in found) else DONE


def print_verdict(found: Sequence[NamedFinding], *, as_json: bool) -> None:
    """How many there are of each kind, or all of them as JSON."""
    if as_json:
        print(json.dumps(findings_to_tree(found), indent=2))
    else:
        print_text(count_findings(found))


def print_finding(named: NamedFinding) -> None:
    """A line of what was seen, and one of what to do about it."""
    finding = named.finding
    indent = STATUS_WIDTH + NAME_WIDTH + 2
    style = STYLES[finding.status]
    head = f"{finding.status:<{STATUS_WIDTH}} {named.name:<{NAME_WIDTH}}"
    print_text(f"{head} {finding.saw}", style=style, indent=indent)
    if finding.advice:
        print_text(" " * indent + f"-> {finding.advice}", style=style, indent=indent + 3)


def count_findings(found: Sequence[NamedFinding]) -> str:
    """As in `2 faults, 1 warning, 17 ok`."""
    parts: list[str] = []
    for status in ("fault", "warning"):
        number = sum(finding.status == status for _, finding in found)
        if number:
            parts.append(f"{number} {status}{'s' * (number > 1)}")
    parts.append(f"{sum(finding.status == 'ok' for _, finding in found)} ok")
    return ", ".join(parts)


def findings_to_tree(found: Sequence[NamedFinding]) -> dict[str, object]:
    """For JSON: every finding in order, and whether there is a fault."""
    findings: list[dict[str, str]] = []
    for name, finding in found:
        findings.append({"check": name, "status": finding.status, "saw": finding.saw, "advice": finding.advice})
    return {"fault": exit_code_of(found) == FAULT, "findings": findings}
