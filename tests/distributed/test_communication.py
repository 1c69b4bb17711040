"""What is counted of a step's collectives, by a clock that is turned by hand; real ranks are in tests/train."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from smoltrain.distributed.communication import CommunicationMeter, StepCommunication, sent_bytes


class Moment:
    """Of a clock that goes on by a second whenever it is looked at."""

    def __init__(self, clock: "itertools.count[int]") -> None:
        self.at = next(clock)

    def seconds_since(self, earlier: "Moment") -> float:
        return self.at - earlier.at


@pytest.fixture
def step() -> StepCommunication:
    clock = itertools.count()
    return StepCommunication(lambda: Moment(clock))


class Work:
    """A collective under way."""

    def wait(self) -> str:
        return "done"

    def is_completed(self) -> bool:
        return False


def all_gather(whole: Any, part: Any, group: Any, async_op: bool) -> Work | None:
    return Work() if async_op else None


def ranks_of(group: Any) -> int:
    return {None: 4, "pair": 2}[group]


def metered(meter: CommunicationMeter) -> Callable[..., Any]:
    return meter.metered(all_gather, "all-gather", ranks_of)


@pytest.mark.parametrize(("kind", "sent"), [
    ("reduce-scatter", 75), ("all-gather", 75), ("all-reduce", 150), ("all-to-all", 100), ("broadcast", 100),
])  # fmt: skip
def test_a_rank_sends_its_share_around_a_ring(kind: Any, sent: int) -> None:
    assert sent_bytes(kind, 100, 4) == sent
    assert sent_bytes(kind, 100, 1) == 0


def test_a_collective_counts_once_however_it_is_made_of_others(step: StepCommunication) -> None:
    meter = CommunicationMeter()
    meter.record_into(step)
    with meter.measure("all-reduce", 100, 2), meter.measure("all-gather", 100, 2):
        pass
    assert (step.sent_bytes, step.seconds()) == (100, 1)


def test_what_lies_between_two_steps_is_not_counted(step: StepCommunication) -> None:
    meter = CommunicationMeter()
    for recorded in (None, step, None):
        meter.record_into(recorded)
        with meter.measure("all-reduce", 100, 2):
            pass
        metered(meter)(torch.zeros(8), torch.zeros(2), None, False)
    assert (step.sent_bytes, step.seconds()) == (100 + 32 * 3 / 4, 2)


def test_a_collective_beside_computing_counts_where_it_is_waited_for(step: StepCommunication) -> None:
    meter = CommunicationMeter()
    meter.record_into(step)
    work = metered(meter)(whole=[torch.zeros(4), torch.zeros(4)], part=torch.zeros(4), group="pair", async_op=True)
    step.take_moment()  # which takes a second of computing
    meter.record_into(None)
    assert work.wait() == "done"
    assert not work.is_completed()
    assert (step.sent_bytes, step.seconds()) == (16, 2), "the call and the wait"


def test_a_collective_that_fails_leaves_the_meter_on(step: StepCommunication) -> None:
    meter = CommunicationMeter()
    meter.record_into(step)
    with pytest.raises(RuntimeError, match="connection closed"), meter.measure("all-reduce", 8, 2):
        raise RuntimeError("connection closed by peer")
    with meter.measure("all-reduce", 8, 2):
        pass
    assert step.sent_bytes == 16, "of both"
