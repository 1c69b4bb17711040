"""A clock that stands still while its process does: Ctrl-Z, SIGSTOP, a suspended job, a frozen container."""

import time


class AwakeClock:
    """Counts the seconds in which this process could run.

    Whoever looks again and again, and then comes only after more than `most_s` seconds, was suspended.
    """

    def __init__(self, most_s: float) -> None:
        self._most_s, self._seconds, self._last = most_s, 0.0, time.monotonic()

    def now(self) -> float:
        """Seconds since it was made."""
        before, self._last = self._last, time.monotonic()
        self._seconds += min(self._last - before, self._most_s)
        return self._seconds
