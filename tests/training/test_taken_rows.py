"""The rows of a step: ranks wait for each other's, say so, and leave together."""

from typing import Any

from smoltrain.config.load import load_config
from smoltrain.data.documents.reader_health import ReaderHealth
from smoltrain.data.rows.loader import StepRows
from smoltrain.errors import Problem, UserError
from tests.ranks import world
from tests.sessions import bare_session


class Slow:
    """A loader whose rows come at the third asking on one rank, or never."""

    num_counts = 2

    def __init__(self, rank: int, error: UserError | None = None) -> None:
        self.health, self._asked, self._rank, self._error = ReaderHealth(), 0, rank, error

    def wait_until_ready(self, timeout_s: float) -> bool:
        self._asked += 1
        if world().rank == self._rank and self._error:
            raise self._error
        return world().rank != self._rank or self._asked >= 3

    def fetch_step_rows(self) -> StepRows:
        return StepRows([], [world().rank, 7])

    def unpack_totals(self, counts: list[int]) -> list[int]:
        return counts


def waiting(rank: int, error: UserError | None, stop: bool) -> tuple[Any, list[str]]:
    """What a rank gets, and what it says, while another one waits for its data."""
    from smoltrain.training import taken_rows

    loader: Any = Slow(rank, error)
    session = bare_session(load_config("quickstart"), None, loader, stop=lambda: stop and world().rank == 0)
    say_s, wait_s = taken_rows.SAY_S, taken_rows.WAIT_S
    taken_rows.SAY_S = taken_rows.WAIT_S = 0.0
    try:
        got: Any = taken_rows.take_rows_together(session)
    except UserError as raised:
        got = str(raised)
    finally:
        taken_rows.SAY_S, taken_rows.WAIT_S = say_s, wait_s
    return got, session.tracker.said


def test_ranks_wait_for_each_others_rows_and_say_so(ranks: Any) -> None:
    for taken, said in ranks(2).run(waiting, 1, None, False):
        assert taken.waited_s >= 0
        assert taken.totals == [0 + 1, 7 + 7], "counts of the rounds in which somebody waited are not added up"
        assert said == ["rank 1 waits for data: rows"] * 2


def test_a_rank_that_cannot_have_its_rows_stops_all(ranks: Any) -> None:
    error = UserError(Problem("the shard is gone", "404", "it", "data.path"))
    results = ranks(2).run(waiting, 1, error, False)
    assert [got for got, _ in results] == ["the shard is gone: saw 404, want it; change data.path"] * 2


def test_a_signal_ends_the_waiting(ranks: Any) -> None:
    for got, _ in ranks(2).run(waiting, 1, None, True):
        assert type(got).__name__ == "StopRequest"
        assert not got.waited_for_data, "it came before anybody had waited"
