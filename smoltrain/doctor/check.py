"""A check, what it finds, and how checks are run: each within its time, and none of them ends another."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from smoltrain.errors import UserError, exception_message
from smoltrain.redact import redact_text
from smoltrain.timeout import call_with_timeout

Status = Literal["ok", "warning", "fault"]
LIMIT_S = 8.0  # of a check that says nothing else


@dataclass(frozen=True)
class Finding:
    """What a check has found. A warning is slow or odd, with a fault a run does not start or is not right."""

    status: Status
    saw: str
    advice: str = ""  # what to do; never empty but where all is well

    def __post_init__(self) -> None:
        assert self.status == "ok" or self.advice, f"{self.saw}: and what is to be done?"


@dataclass(frozen=True)
class Check:
    """One thing that is looked at. `run` reads and measures; it may raise, and may hang."""

    name: str
    run: Callable[[], Finding]
    limit_s: float = LIMIT_S


def run_check(check: Check) -> Finding:
    """What a check finds, or why it did not: one that hangs is left behind on its thread. Never raises."""
    try:
        found = call_with_timeout(check.run, check.limit_s)
    except TimeoutError as error:
        advice = "whatever it asks hangs (a file system, a driver, a server): a run would hang there too"
        found = Finding("fault", f"no answer within {check.limit_s:g} s ({exception_message(error)})", advice)
    except UserError as error:
        found = finding_of_error(error)
    except Exception as error:  # of a file that is not as it should be, or of ours: the other checks go on
        saw = f"could not be looked at: {type(error).__name__}: {exception_message(error)}"
        found = Finding("warning", saw, "look at it by hand")
    return Finding(found.status, redact_text(found.saw), redact_text(found.advice))


def finding_of_error(error: UserError) -> Finding:
    """The mistake that a run would end with."""
    saw = "; ".join(f"{problem.what}: {problem.saw}" for problem in error.problems)
    advice = "; ".join(f"{problem.want}; change {problem.change}" for problem in error.problems)
    return Finding("fault", saw, advice)


def worst_finding(findings: list[Finding]) -> Finding:
    """Several findings about one thing as one: what is wrong with it, or all of it where nothing is."""
    for status in ("fault", "warning"):
        bad = [finding for finding in findings if finding.status != "ok"]
        if any(finding.status == status for finding in bad):
            saw = "; ".join(finding.saw for finding in bad)
            return Finding(status, saw, "; ".join(finding.advice for finding in bad))
    return Finding("ok", "; ".join(finding.saw for finding in findings))
