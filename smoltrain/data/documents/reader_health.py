"""Who waits for what: the pending waits of the readers of one rank, and the notes that they leave for its console."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

SILENCE_S = 10.0  # from when on a request without an answer counts as waiting
NOTE_EVERY_S = 600.0  # at most one line in that time about the same fault of the same shard


@dataclass
class PendingWait:
    """A read that is blocked, or about to be tried again."""

    name: str  # of the shard
    what: str  # it waits for, or has failed with
    since: float  # these on time.monotonic
    next_try: float | None = None


class ReaderHealth:
    """Pending waits and notices of one rank's readers, which tell them from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waits: dict[object, PendingWait] = {}
        self._noted_at: dict[tuple[str, str], float] = {}  # (shard or kind of note, fault) -> time.monotonic
        self._notes: list[str] = []
        self._stop = threading.Event()

    def describe_wait(self) -> str | None:
        """What a reader waits for right now, as "SHARD: HTTP 503, for 120 s, next try in 30 s"; None if none does."""
        now = time.monotonic()
        with self._lock:
            waits = [wait for wait in self._waits.values() if wait.next_try or now - wait.since >= SILENCE_S]
        if not waits:
            return None
        longest = min(waits, key=lambda wait: wait.since)
        line = f"{longest.name}: {longest.what}, for {now - longest.since:.0f} s"
        if longest.next_try is not None:
            seconds = longest.next_try - now
            line += f", next try in {seconds:.0f} s" if seconds > 0 else ", trying again"
        num_others = len({wait.name for wait in waits} - {longest.name})
        return line + (f" (and {num_others} more)" if num_others else "")

    def take_notes(self) -> list[str]:
        """Lines about new faults, each handed out once."""
        with self._lock:
            notes = self._notes
            self._notes = []
        return notes

    def add_note(self, line: str) -> None:
        """A line to be handed out with the others."""
        with self._lock:
            self._notes.append(line)

    def add_note_once(self, kind: str, line: str) -> None:
        """A line to be handed out, unless one of its kind was."""
        with self._lock:
            self._add_note_if_due((kind, ""), line, every_s=float("inf"))

    def stop(self) -> None:
        """No reader waits any longer: those that do, and those that would, raise their UserError."""
        self._stop.set()

    @contextlib.contextmanager
    def track_request(self, name: str) -> Iterator[None]:
        """Around a request to a server, which may be silent."""
        key = object()
        with self._lock:
            self._waits[key] = PendingWait(name, "no answer", time.monotonic())
        try:
            yield
        finally:
            self.clear_wait(key)

    def report_failure(self, key: object, wait: PendingWait, note: str) -> None:
        """`key` waits; `note` says so, unless the same was said of the same shard not long ago."""
        with self._lock:
            self._waits[key] = wait
            self._add_note_if_due((wait.name, wait.what), note, every_s=NOTE_EVERY_S)

    def clear_wait(self, key: object) -> None:
        """`key` waits no more."""
        with self._lock:
            self._waits.pop(key, None)

    def sleep_unless_stopped(self, seconds: float) -> bool:
        """Whether that time went by without `stop`."""
        return not self._stop.wait(seconds)

    def _add_note_if_due(self, subject: tuple[str, str], line: str, every_s: float) -> None:
        """At most one line about a subject in that time. The lock is held."""
        now = time.monotonic()
        if subject not in self._noted_at or now - self._noted_at[subject] >= every_s:
            self._noted_at[subject] = now
            self._notes.append(line)
