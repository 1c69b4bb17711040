"""A call with a time limit. A client that hangs (in the look-up of a name, say) cannot be stopped from outside, so the
call runs on a daemon thread, which is left behind when the time is over.
"""

import threading
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")


def call_with_timeout(call: Callable[[], Value], seconds: float) -> Value:
    """What the call returns. Errors: its own; TimeoutError after `seconds`, where it may still go on by itself."""
    returned: list[Value] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            returned.append(call())
        except BaseException as error:  # some clients raise SystemExit, which would end the thread without a word
            raised.append(error)

    thread = threading.Thread(target=run, name="call_with_timeout", daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0] if isinstance(raised[0], Exception) else RuntimeError(repr(raised[0]))
    if not returned:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return returned[0]
