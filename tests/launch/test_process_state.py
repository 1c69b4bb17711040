"""What a run changes of its process comes back, also after an error."""

import contextlib
import faulthandler
import logging
import os
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from smoltrain.launch.process_state import keep_process_state


def draw_numbers() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def test_everything_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOLTRAIN_TEST_KEPT", "before")
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = draw_numbers()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    log = logging.getLogger("smoltrain")
    own = logging.FileHandler(tmp_path / "own.log", mode="w")
    foreign = logging.FileHandler(tmp_path / "foreign.log")
    log.addHandler(own)
    threads, hook, handlers, filters = torch.get_num_threads(), sys.excepthook, list(log.handlers), warnings.filters[:]
    environment, level, propagate = dict(os.environ), log.level, log.propagate
    crash_reports = faulthandler.is_enabled()
    try:
        with contextlib.suppress(ZeroDivisionError), keep_process_state(torch.device("cpu")):
            draw_numbers()
            os.environ["MASTER_PORT"] = "1"
            os.environ["SMOLTRAIN_TEST_KEPT"] = "inside"
            torch.set_num_threads(threads + 1)
            sys.excepthook = print
            log.removeHandler(own)
            log.addHandler(foreign)
            log.setLevel(logging.CRITICAL)
            log.propagate = not propagate
            warnings.simplefilter("ignore")
            raise ZeroDivisionError
        assert draw_numbers() == expected
        assert dict(os.environ) == environment
        assert (torch.get_num_threads(), sys.excepthook, log.handlers) == (threads, hook, handlers)
        assert (log.level, log.propagate, warnings.filters[:]) == (level, propagate, filters)
        assert faulthandler.is_enabled() == crash_reports
        assert foreign.stream is None or foreign.stream.closed, "the file of a run that is over"
        assert own.stream is not None, "which a closed handler has not"
    finally:
        log.removeHandler(own)
        own.close()
