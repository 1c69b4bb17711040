"""A clock that stands still while its process does."""

import time

import pytest

from smoltrain.distributed.awake_clock import AwakeClock


def test_a_pause_counts_as_no_more_than_the_longest_gap_between_two_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = AwakeClock(3.0)
    for seconds, shown in ((1.0, 1.0), (2.5, 3.5), (3600.0, 6.5), (0.0, 6.5), (1.0, 7.5)):
        now[0] += seconds
        assert clock.now() == pytest.approx(shown)
