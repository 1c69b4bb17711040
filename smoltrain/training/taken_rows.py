"""The rows of the next step, taken by all ranks together, or the stop of one of them, at which all leave."""

import time
from dataclasses import dataclass

from smoltrain.data.rows.batch import Batch
from smoltrain.data.rows.loader import StepRows, StepTotals
from smoltrain.errors import UserError
from smoltrain.training.session import Session

WAIT_S = 1.0  # for this rank's rows, before the ranks tell each other how they stand
POLL_S = 0.2  # between two looks at whether this rank is to stop meanwhile
SAY_S = 30.0  # between two lines that say who waits for data


@dataclass(frozen=True)
class TakenRows:
    """The next rows of this rank, when every rank has its own."""

    micro_batches: list[Batch]
    totals: StepTotals
    waited_s: float  # for this rank's rows


@dataclass(frozen=True)
class StopRequest:
    """Some rank is to stop, so all do."""

    waited_for_data: bool


def take_rows_together(session: Session) -> TakenRows | StopRequest:
    """Wait until every rank has its next rows, or one of them is to stop. Collective: one all-reduce if nobody waits.

    Ranks whose own rows are there ask again every second instead of waiting in a reduction that would time out. A rank
    that is to stop waits for no data. Errors: UserError on every rank, where one of them cannot have its rows.
    """
    loader = session.loader
    world = session.world
    rows: StepRows | None = None
    waited_s = 0.0
    waited_for_data = False
    last_said_s = time.monotonic()
    while True:
        session.watchdog.mark("data")
        problem: UserError | None = None
        began_s = time.perf_counter()
        try:
            if rows is None and _wait_for_own_rows(session):
                rows = loader.fetch_step_rows()
        except UserError as error:
            problem = error
        waited_s += time.perf_counter() - began_s
        session.watchdog.mark("reduction")
        counts = rows.counts if rows else [0] * loader.num_counts
        stops = session.stop.is_raised()
        num_stops, num_problems, num_waiting, *sums = world.sum_ints(stops, problem is not None, rows is None, *counts)
        if num_stops:
            return StopRequest(waited_for_data)
        if num_problems:
            raise next(error for error in world.gather(problem) if error)
        if rows and not num_waiting:
            return TakenRows(rows.micro_batches, loader.unpack_totals(sums), waited_s)
        waited_for_data = True
        if time.monotonic() >= last_said_s + SAY_S:
            last_said_s = time.monotonic()
            waits = None if rows else loader.health.describe_wait() or "rows"
            for rank, what in enumerate(world.gather(waits)):
                if what:
                    session.tracker.say(f"rank {rank} waits for data: {what}")


def _wait_for_own_rows(session: Session) -> bool:
    """Whether this rank's rows are there, after at most WAIT_S; False at once if it is to stop."""
    deadline_s = time.monotonic() + WAIT_S
    while not session.stop.is_raised():
        if session.loader.wait_until_ready(min(POLL_S, WAIT_S)):
            return True
        if time.monotonic() >= deadline_s:
            return False
    return False
