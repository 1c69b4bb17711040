"""What every test of a room's tracker needs."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _own_loggers() -> Iterator[None]:
    """A tracker opens the log of its rank: it is closed, and the loggers are as before."""
    loggers = [logging.getLogger(name) for name in ("smoltrain", "DeepSpeed")]
    before = [(logger, list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, handlers, level, propagate in before:
        for handler in set(logger.handlers) - set(handlers):
            handler.close()
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)
