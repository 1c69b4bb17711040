"""logs/rankN.log: what each rank says, and what DeepSpeed logs on it."""

import logging
import sys
from pathlib import Path


class RankLogHandler(logging.FileHandler):
    """Writes logs/rankN.log, until the log of another start is opened."""


def open_rank_log(path: Path) -> logging.Logger:
    """Open logs/rankN.log: what this rank says, and what DeepSpeed logs on it, which leaves the console."""
    path.parent.mkdir(parents=True, exist_ok=True)
    logging.raiseExceptions = False  # a full disk must not cover the console with tracebacks
    handler = RankLogHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    log = logging.getLogger("smoltrain")
    log.setLevel(logging.INFO)
    log.propagate = False
    for logger in (log, logging.getLogger("DeepSpeed")):
        for old in list(logger.handlers):
            if isinstance(old, logging.FileHandler) or getattr(old, "stream", None) in (sys.stdout, sys.stderr):
                logger.removeHandler(old)
            if isinstance(old, RankLogHandler):
                old.close()
        logger.addHandler(handler)
    return log
