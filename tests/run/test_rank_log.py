"""The log of each rank, in a process that has logs of its own."""

import logging
from pathlib import Path

from smoltrain import files
from tests import tiny
from tests.run.test_track import opened


def test_a_programs_own_metrics_and_log_handlers_are_its_own(tmp_path: Path) -> None:
    foreign = logging.FileHandler(tmp_path / "program.log", mode="w")
    logging.getLogger("program").addHandler(foreign)
    try:
        for _ in range(2):  # the second start opens the same log
            tracker = opened(tmp_path)
            tracker.log_metrics(1, {"custom/accuracy": 0.5})
            tracker.close(0)
        logging.getLogger("program").warning("still here")
        assert (tmp_path / "program.log").read_text() == "still here\n", "a tracker closes no handler but its own"
    finally:
        logging.getLogger("program").removeHandler(foreign)
        foreign.close()
    lines = list(files.read_jsonl(tiny.load(tmp_path).run_folder / "metrics.jsonl"))
    assert [line["custom/accuracy"] for line in lines][-1] == 0.5
    open_logs = [path for path in Path("/proc/self/fd").iterdir() if str(path.resolve()).startswith(str(tmp_path))]
    assert len(open_logs) == 1, "the log of the run, once"
