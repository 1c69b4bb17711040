"""A clock that stands still while its process does: Ctrl-Z, SIGSTOP, a suspended job, a frozen container."""

import time


class AwakeClock:
    """Counts the seconds in which this process could run.

    Whoever looks again and again, and then comes only after more than `most_s` seconds, was suspended.
    """

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s
        self._seconds = 0.0
        self._last = time.monotonic()

    def now(self) -> float:
        """Seconds since it was made."""
        now = time.monotonic()
        self._seconds += min(now - self._last, self._most_s)
        self._last = now
        return self._seconds
