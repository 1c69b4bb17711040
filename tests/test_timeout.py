"""A call with a time limit: what it returns, what it raises, and what happens when it hangs."""

import threading
import time

import pytest

from smoltrain.timeout import call_with_timeout


def test_a_call_passes_on_what_is_returned_and_raised():
    assert call_with_timeout(lambda: 3, 10) == 3
    assert call_with_timeout(lambda: None, 10) is None
    with pytest.raises(ZeroDivisionError):
        call_with_timeout(lambda: 1 // 0, 10)


def test_a_client_that_asks_for_the_end_of_the_process_has_failed():
    def leave() -> None:
        raise SystemExit(3)

    with pytest.raises(RuntimeError, match=r"SystemExit\(3\)"):
        call_with_timeout(leave, 10)


def test_a_call_that_hangs_is_given_up():
    never = threading.Event()
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.05 s"):
        call_with_timeout(never.wait, 0.05)
    assert time.monotonic() - began < 5
    never.set()
