"""Each contender at each of its rates, in turn; every finished run is kept in a folder and not repeated."""

import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.contenders import Contender
from benchmarks.launchers import trainer_environment
from benchmarks.loss_curves import MIN_STEPS, WARM_UP, Entry, find_steps_until
from benchmarks.peers import PeerUnavailable
from benchmarks.timing import summarise_times
from benchmarks.watching import GRACE_S, Evaluation, TrainerFailed, TrainerRecord, watch_trainer
from smoltrain import files
from smoltrain.errors import TrainingStopped


def run_sweep(
    contenders: Sequence[Contender], every: int, results: Path, *, cuda: bool
) -> tuple[dict[str, dict[float, TrainerRecord]], dict[tuple[str, float], str]]:
    """Run each trainer at each of its rates, in turn, unless that run is in the results folder.

    Finished runs by name and rate; and of those that failed, why. What a trainer that failed has said is kept.
    """
    runs: dict[str, dict[float, TrainerRecord]] = {contender.name: {} for contender in contenders}
    failed: dict[tuple[str, float], str] = {}
    for number in range(max(len(contender.rates) for contender in contenders)):
        for contender in contenders:
            if number >= len(contender.rates):
                continue
            rate = contender.rates[number]
            file = results / "runs" / f"{_file_name(contender.name)}-{rate:g}.json"
            try:
                record = read_run(file) if file.is_file() else None
                kept = "" if record is None else f", kept from {file.name}"
                if record is None:
                    log = file.with_suffix(".log")
                    record = watch_contender(contender, rate, contender.steps, every, log, cuda=cuda)
                    done = {"time": time.time(), "trainer": contender.name, "rate": rate, "run": asdict(record)}
                    files.write_json_file(file, done)
            except (PeerUnavailable, TrainerFailed) as why:
                failed[contender.name, rate] = str(why)
                print(f"{contender.name} at {rate:g} failed: {why}", flush=True)
                continue
            runs[contender.name][rate] = record
            _say_run(contender.name, rate, record, kept)
    return runs, failed


def time_best_runs(
    contenders: Sequence[Contender], entries: Sequence[Entry], loss: float, every: int, rounds: int, results: Path,
    *, cuda: bool,
) -> list[Entry]:  # fmt: skip
    """The same entries, each with more runs at its best rate, in turn, up to the step at which it reached the loss."""
    launched = {contender.name: contender for contender in contenders}
    timed: dict[str, list[TrainerRecord]] = {entry.name: [] for entry in entries}
    for _ in range(rounds):
        for entry in entries:
            until = find_steps_until(entry.best.evaluations, loss, interpolate=False) or entry.steps
            log = results / "runs" / f"{_file_name(entry.name)}-timed.log"
            try:
                steps = max(int(until), MIN_STEPS)
                record = watch_contender(launched[entry.name], entry.best_rate, steps, every, log, cuda=cuda)
            except TrainerFailed as why:
                raise TrainingStopped(f"{entry.name}, which had run, failed: {why}") from None
            timed[entry.name].append(record)
            _say_run(entry.name, entry.best_rate, record, ", for the seconds")
    return [Entry(entry.name, entry.steps, entry.runs, timed[entry.name]) for entry in entries]


def watch_contender(
    contender: Contender, rate: float, steps: int, every: int, log: Path, *, cuda: bool
) -> TrainerRecord:
    """One run at a rate, ended after so many steps; its words stay in `log` if it fails.

    Errors: PeerUnavailable, TrainerFailed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    launch = contender.launch(rate)
    with tempfile.TemporaryDirectory() as folder:
        command, lines, variables = launch(Path(folder))
        env = trainer_environment(Path(command[0]).parent, 1, cuda=cuda) | variables
        said = Path(folder, "log")
        grace_s = GRACE_S if steps == contender.steps else 0.0
        try:
            return watch_trainer(
                command, lines, steps, env, said, cuda=cuda, evaluations=steps // every, grace_s=grace_s
            )
        except TrainerFailed as why:
            raise TrainerFailed(f"{why} ({shutil.copy(said, log)})") from None


def read_run(file: Path) -> TrainerRecord:
    """A run that was kept."""
    kept = json.loads(file.read_text(encoding="utf-8"))["run"]
    return TrainerRecord(**kept | {"evaluations": [Evaluation(**found) for found in kept["evaluations"]]})


def _file_name(trainer: str) -> str:
    return trainer.replace(", ", "-").replace(" ", "-")


def _say_run(name: str, rate: float, record: TrainerRecord, how: str) -> None:
    took = summarise_times(record.step_s[WARM_UP:], record.waits_s[WARM_UP:])
    last = record.evaluations[-1]
    print(
        f"{name} at {rate:g}: validation loss {last.loss:.4f} after {last.step} steps, {took.median_s:.3f} s a step, "
        f"clean {took.clean}{how}", flush=True,
    )  # fmt: skip
