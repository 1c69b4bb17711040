"""A bare Session of real parts, for what needs a step, an evaluation or samples and no run around them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from smoltrain.config.schema import Config, SpikesSection
from smoltrain.schedule import Plan
from tests.ranks import world


@dataclass
class SilentTracker:
    """Stands in for the console: what was said is in `said`."""

    said: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        self.said.append(text)


class Marks:
    """Stands in for a Watchdog: the places that were marked are in `places`."""

    def __init__(self) -> None:
        self.places: list[str] = []

    def begin_step(self, step: int) -> None:
        pass

    def mark(self, place: str) -> None:
        self.places.append(place)


class Stop:
    """Stands in for a StopFlag: raised when `asked` says so."""

    def __init__(self, asked: Callable[[], bool] = lambda: False) -> None:
        self._asked = asked

    @property
    def reason(self) -> str | None:
        return "SIGTERM" if self._asked() else None

    def is_raised(self) -> bool:
        return self._asked()


def bare_session(
    config: Config, engine: Any, loader: Any, *, guard: Any = None, stop: Callable[[], bool] = lambda: False,
    journal: Path | None = None, reads_late: bool = False,
) -> Any:  # fmt: skip
    """The session of the rank that asks: it trains, evaluates and samples, and writes nothing down."""
    from smoltrain.training.session import Session
    from smoltrain.training.spikes import SpikeGuard

    nothing = cast(Any, None)
    return Session(
        start=nothing, config=config, world=world(), stop=cast(Any, Stop(stop)), plan=Plan(config.phases),
        watchdog=cast(Any, Marks()), loader=loader, engine=engine,
        guard=guard or SpikeGuard(SpikesSection(), world(), journal), tracker=cast(Any, SilentTracker()), saver=nothing,
        ledger=None, folder=nothing, precision="", reads_late=reads_late,
    )  # fmt: skip


def train_steps(steps: range, session: Any) -> list[Any]:
    """The results of these steps, of which none but the last is awaited."""
    from smoltrain.training import step

    return [result for _, result in step.train_steps(steps, session, lambda _: False)]
