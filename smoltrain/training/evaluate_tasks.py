"""Tasks of lm-evaluation-harness during training, over all ranks.

The first rank runs the harness, which asks for scores and texts; the others serve it. Texts to score are dealt to the
ranks in batches; what is written they all write together, since the forward pass of ZeRO-3 is collective.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smoltrain.errors import TrainingStopped, exception_message
from smoltrain.evaluation.judge import WriteRequest, WritingRules, write_text
from smoltrain.evaluation.score import Score, Window, plan_batches, score_batch
from smoltrain.training.session import Session

if TYPE_CHECKING:
    from smoltrain.evaluation.harness import HarnessTasks

TaskMetrics = dict[str, dict[str, float]]  # by task, then by metric


@dataclass(frozen=True)
class Work:
    """What the first rank asks of all; one of the two."""

    windows: Sequence[Window] = ()
    requests: Sequence[WriteRequest] = ()


class EvaluationStopped(Exception):
    """A rank is to stop: all leave the evaluation."""


def evaluate_run_tasks(session: Session, tasks: "HarnessTasks | None") -> TaskMetrics | None:
    """The metrics of each task, on every rank; None if a rank is to stop, or the harness has failed. Collective.

    Errors: TrainingStopped for a model whose logits are not finite.
    """
    with session.engine.evaluation_mode():
        try:
            if tasks is None:
                return _serve(session)
            return _lead(session, tasks)
        except EvaluationStopped:
            return None


def _lead(session: Session, tasks: "HarnessTasks") -> TaskMetrics | None:
    """On the first rank: run the harness, and tell the others when it is done."""
    from smoltrain.evaluation import harness

    metrics: TaskMetrics | None = None
    try:
        limit = session.config.evaluate.tasks_limit
        metrics = harness.measure_tasks(tasks, RankJudge(session), limit).metrics
    except (EvaluationStopped, TrainingStopped):
        raise
    except Exception as error:  # of a task's own code, say: no reason to end a run
        saw = f"{type(error).__name__}: {exception_message(error)}"
        session.tracker.say(f"WARNING: the tasks were not measured ({saw})")
    return session.world.run_on_first_rank(lambda: metrics)


def _serve(session: Session) -> TaskMetrics | None:
    """On the other ranks: do what the first one asks for, until it sends the metrics."""
    while True:
        asked: Any = session.world.run_on_first_rank(lambda: None)
        if not isinstance(asked, Work):
            return asked
        _do_work(session, asked)


class RankJudge:
    """The model that trains, as the harness on the first rank sees it."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.tokenizer = session.loader.prepared.tokenizer
        self.context = session.config.model.max_position_embeddings

    def score(self, windows: Sequence[Window]) -> list[Score]:
        """See Judge."""
        return self._ask(Work(windows=windows))

    def write(self, requests: Sequence[WriteRequest]) -> list[str]:
        """See Judge."""
        return self._ask(Work(requests=requests))

    def _ask(self, work: Work) -> list[Any]:
        self._session.world.run_on_first_rank(lambda: work)
        return _do_work(self._session, work)


def _do_work(session: Session, work: Work) -> list[Any]:
    return _write_together(session, work.requests) if work.requests else _score_together(session, work.windows)


def _score_together(session: Session, windows: Sequence[Window]) -> list[Score]:
    """The scores of all windows, on every rank; each rank computes every so many-th batch."""
    world = session.world
    batches = plan_batches(windows, session.config.model.vocab_size)
    own: dict[int, Score] = {}
    failure: TrainingStopped | None = None
    for first in range(0, len(batches), world.size):
        _check_stop(session)
        # In the last round a rank may have none of its own: it computes the first one too, as all must go along.
        places = batches[first + world.rank if first + world.rank < len(batches) else first]
        try:
            scores = score_batch(session.engine.module, [windows[place] for place in places])
            own.update(zip(places, scores, strict=True))
        except TrainingStopped as error:
            failure = error

    def report() -> dict[int, Score]:
        if failure:
            raise failure
        return own

    world.run_on_every_rank(report)
    together = {place: score for part in world.gather(own) for place, score in part.items()}
    return [together[place] for place in range(len(windows))]


def _write_together(session: Session, requests: Sequence[WriteRequest]) -> list[str]:
    """What the model writes behind each, on every rank the same."""
    config = session.config
    tokenizer = session.loader.prepared.tokenizer
    banned_ids = tokenizer.unused_ids(config.model.vocab_size)
    rules = WritingRules(tokenizer, session.stop_ids, banned_ids, config.run.seed)
    texts: list[str] = []
    for request in requests:
        _check_stop(session)
        texts.append(write_text(session.engine.module, rules, request))
    return texts


def _check_stop(session: Session) -> None:
    """Errors: EvaluationStopped on every rank if any is to stop."""
    session.watchdog.mark("evaluation")
    if session.is_any_to_stop():
        raise EvaluationStopped
