"""What a run has written so far, read on at each look: for the live view. Of a long run the curve is read in pieces."""

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smoltrain import files
from smoltrain.config.config_file import CONFIG_FILE
from smoltrain.config.load import read_run_config
from smoltrain.config.schema import Config
from smoltrain.errors import UserError
from smoltrain.files import METRICS_FILE
from smoltrain.monitor.chart import Point
from smoltrain.monitor.run_state import RunState, find_run_state, read_run_plan
from smoltrain.monitor.run_status import RECENT_STEPS, TRAINING_LOSS, VALIDATION_LOSS, mean_throughput
from smoltrain.monitor.tail import JsonlFollower, read_tail
from smoltrain.run.run_folder import SAMPLES_FILE, SPIKES_FILE
from smoltrain.run.time_left import TimeLeft
from smoltrain.schedule import Plan

WHOLE_BYTES = 2**22  # of new records that are read in full: a run of some thousands of steps
NUM_PIECES = 256  # of what lies before them
PIECE_BYTES = 2**14
LOG_BYTES = 2**18
SAMPLE_BYTES = 2**16
MAX_POINTS = 8192  # of a curve that are kept: more than any terminal has dots
WARNING_LINE = re.compile(r"^\S+ \S+ smoltrain \w+ (WARNING: .*)$", re.MULTILINE)


class RunReader:
    """A run, as far as its files tell. `refresh` reads what is new; a file that is not there yet may come later."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: Config | None = None
        self.config_damage = ""
        self.state = RunState("waiting", "")
        self.last_step: int | None = None  # of the plan
        self.numbers: dict[str, Any] = {}  # the newest value of each name
        self.newest: Mapping[str, Any] = {}  # the newest line
        self.losses: list[Point] = []
        self.validations: list[Point] = []
        self.recent_steps: list[dict[str, Any]] = []
        self.warnings: list[str] = []  # of rank 0's log, the newest last
        self.sample: dict[str, Any] | None = None  # the newest one
        self.num_spikes = 0
        self._config_is_of = 0  # its file's time of modification
        self._metrics = JsonlFollower(folder / METRICS_FILE)
        self._time_left: TimeLeft | None = None
        self._sizes: dict[Path, int] = {}  # of files, at the last look

    @property
    def step(self) -> int:
        """The last step that was trained."""
        return int(self.newest.get("step", 0))

    @property
    def phase(self) -> str:
        """The phase of that step; "" where nobody knows."""
        if self.config is None or self.last_step is None or not 1 <= self.step <= self.last_step:
            return ""
        return Plan(self.config.phases).phase(self.step).name

    @property
    def tokens_per_s(self) -> float | None:
        """Targets per second, all ranks, over the last steps."""
        return mean_throughput(self.recent_steps)

    def refresh(self, now_s: float | None = None) -> None:
        """Read what is new. Errors: OSError for a file that is there and cannot be read."""
        now_s = time.time() if now_s is None else now_s
        plan = read_run_plan(self.folder)
        self.last_step = plan.last_step if plan else None
        self._read_config()
        self._read_metrics()
        self._read_log()
        self._read_samples()
        self.state = find_run_state(self.folder, plan, self.newest, now_s)

    def estimate_left_s(self, now_s: float) -> float | None:
        """Seconds until the plan is complete, from now on; None where nobody can say."""
        if self._time_left is None or self.state.state != "running":
            return None
        left_s = self._time_left.estimate_s(self.step)
        if left_s is None:
            return None
        return max(0.0, left_s - max(0.0, now_s - float(self.newest.get("time_s", now_s))))

    def _read_config(self) -> None:
        path = self.folder / CONFIG_FILE
        modified = path.stat().st_mtime_ns if path.is_file() else 0
        if modified == self._config_is_of:
            return
        self._config_is_of = modified
        try:
            self.config = read_run_config(path) if modified else None
            self.config_damage = ""
        except UserError as error:
            self.config = None
            self.config_damage = str(error.problems[0])
        self._time_left = None

    def _read_metrics(self) -> None:
        lines, begins_anew = self._metrics.read_new(WHOLE_BYTES, NUM_PIECES, PIECE_BYTES)
        if begins_anew:
            self.numbers = {}
            self.newest = {}
            self.losses = []
            self.validations = []
            self.recent_steps = []
            self._time_left = None
        if self._time_left is None and self.config is not None:
            several = len(self.config.phases) > 1
            self._time_left = TimeLeft(self.config, Plan(self.config.phases).last_step, restarts=several)
            for line in self.recent_steps:
                self._time_left.add(line)
        for line in lines:
            self._add_line(line)
        self.losses = thin_points(self.losses)

    def _add_line(self, line: dict[str, Any]) -> None:
        self.newest = line
        self.numbers.update(line)
        if TRAINING_LOSS in line:
            self.losses.append(Point(line["step"], line[TRAINING_LOSS]))
            self.recent_steps = [*self.recent_steps[1 - RECENT_STEPS :], line]
        if VALIDATION_LOSS in line:
            self.validations.append(Point(line["step"], line[VALIDATION_LOSS]))
        if self._time_left is not None:
            self._time_left.add(line)

    def _read_log(self) -> None:
        log = self.folder / "logs" / "rank0.log"
        if self._has_grown(log):
            self.warnings = WARNING_LINE.findall(read_tail(log, LOG_BYTES).decode(errors="replace"))
        spikes = self.folder / SPIKES_FILE
        if self._has_grown(spikes):
            self.num_spikes = len(files.parse_jsonl(read_tail(spikes, WHOLE_BYTES), ("step", "does")))

    def _read_samples(self) -> None:
        path = self.folder / SAMPLES_FILE
        if self._has_grown(path):
            samples = files.parse_jsonl(read_tail(path, SAMPLE_BYTES), ("step", "prompt", "text"))
            self.sample = samples[-1] if samples else None

    def _has_grown(self, path: Path) -> bool:
        """Whether a file has another size than at the last look; 0 where there is none."""
        try:
            size = path.stat().st_size
        except OSError:
            size = 0
        before = self._sizes.get(path, 0)
        self._sizes[path] = size
        return size != before


def thin_points(points: list[Point]) -> list[Point]:
    """Every second point until there are few enough."""
    while len(points) > MAX_POINTS:
        points = points[::2]
    return points
