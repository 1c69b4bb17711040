"""What a start finds out once, before anything is opened: where to begin, whether the run may go on, its data.

One process works it out, which holds the lock of the run (run_lock.py), and every rank gets the result: under
`smoltrain train` the supervisor, who hands it to the ranks with their config; under other launchers rank 0. Nothing is
hashed or checked a second time: the files of the checkpoint, the tokens and the local sources may be many gigabytes.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from smoltrain.checkpoint.retention import delete_leftovers
from smoltrain.config.load import stop_after_phase
from smoltrain.config.schema import Config
from smoltrain.data.tokens.index import data_index_file
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.errors import UserError
from smoltrain.estimate.devices import measure_cpu_peak
from smoltrain.estimate.horizon import asks_for_epochs, check_epochs_are_countable, read_index, resolve_config
from smoltrain.kernels.precision import choose_precision
from smoltrain.run.run_folder import (
    RunRecord,
    choose_training_ranks,
    describe_idle_ranks,
    find_rows_per_step,
    make_run_record,
)
from smoltrain.schedule import Plan
from smoltrain.training.preflight import check_start
from smoltrain.training.start_point import StartPoint, copy_ancestor_data, find_start_point, is_validation_missing


@dataclass(frozen=True)
class Start:
    """What is known before a session opens. It can be pickled, and is the same on every rank."""

    requested: Config  # as the command describes it; where a rewind begins anew
    config: Config  # the same with every phase in steps: what config.yaml will say, and everything later sees
    point: StartPoint
    num_ranks: int  # that train: fewer than there are where the rows of a step do not divide among all
    record: RunRecord  # what config.yaml will say of the run and its starts
    validation_missing: bool  # the one of `point.step` is to be made up for
    notes: tuple[str, ...]  # what was seen on the way, for the person who watches
    began_at: float  # when the command began, or went on to this phase: seconds since 1970
    cpu_peak_flops: float | None  # as estimate.devices.measure_cpu_peak says; None on a GPU
    preparation_s: float  # since then in which data were found, tokenised and checked
    command_end: int  # the last step of the command, which may go on after this start with another phase
    notes_were_said: bool = False
    choices_were_said: bool = False  # by an earlier start of the same command

    @property
    def plan(self) -> Plan:
        """All phases of the run."""
        return Plan(self.config.phases)

    @property
    def last_step(self) -> int:
        """Where this start ends: at the plan's last step, or at the end of the phase run.stop_after."""
        return self.plan.last_step_until(self.config.run.stop_after)

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step over all ranks, as the run began."""
        return self.record.provenance["rows_per_step"]

    @property
    def has_work(self) -> bool:
        """Whether there is a step to train, or a validation to make up for."""
        return self.point.step < self.last_step or self.validation_missing


def begin_run(
    config: Config, num_ranks: int, device: torch.device, *, say: Callable[[str], None] | None = None,
    one_phase: bool = False, data_ready: bool = False, before: Start | None = None, began_at: float | None = None,
) -> Start:  # fmt: skip
    """Find where to begin, check that the run may, and prepare its data. One process, holding the lock of the run.

    Here, and nowhere else, phases in tokens or epochs become steps: nobody makes a Plan of the config of a command.
    Of `num_ranks` as many train as the rows of a step divide among; what is checked and prepared is for these.
    With `one_phase` the start ends where the first phase does that is not done. `data_ready`: this command has checked
    recipe and data already, at the start of an earlier phase; what that phase has saved is verified, as nobody has read
    it yet. `before` is an earlier start of the same command: of the phase before, or before a rewind. `say` gets the
    notes as they come. `began_at` is when the command began, now by default.
    Errors: UserError for whatever can be known to be wrong before a rank opens anything.
    """
    began_at = began_at or time.time()
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        if say:
            say(text)

    for leftover in delete_leftovers(config.run_folder / "checkpoints"):
        note(leftover)
    requested = config
    point = find_start_point(requested, note)
    rows_per_step = find_rows_per_step(requested, num_ranks, point.ancestor, point.manifest)
    index = read_index(requested.run_folder)
    num_streams = index.streams if index and index.streams > 1 else None
    num_training = choose_training_ranks(requested, rows_per_step, num_ranks, num_streams)
    if num_training < num_ranks:
        note(describe_idle_ranks(rows_per_step, num_training, num_ranks, num_streams))
        num_ranks = num_training
    began_to_prepare_s = time.perf_counter()
    home = _find_counted_run(requested, point) if asks_for_epochs(requested) else None
    if asks_for_epochs(requested) and home is None:
        config = _prepare_and_resolve(requested, rows_per_step, num_ranks, device)
        data_ready = True
    else:
        config = resolve_config(requested, rows_per_step, home)
    preparation_s = time.perf_counter() - began_to_prepare_s
    plan = Plan(config.phases)
    last_step = plan.last_step_until(config.run.stop_after)
    if one_phase:
        phase = plan.phase(min(point.step + 1, last_step)).name
        requested, config = stop_after_phase(requested, phase), stop_after_phase(config, phase)
    asked = {f"phases.{p.name}.{key}": n for p in requested.phases for key, n in p.horizon.items() if key != "steps"}
    record = make_run_record(config, num_ranks, point.step, point.ancestor, point.manifest, asked)
    if not data_ready:
        if point.step < last_step:
            check_start(config, device, num_ranks, rows_per_step)
        began_to_prepare_s = time.perf_counter()
        copy_ancestor_data(config, point)
        prepare_run_data(config, rows_per_step, num_ranks)
        preparation_s += time.perf_counter() - began_to_prepare_s
    missing = is_validation_missing(config, point, last_step)
    cpu_peak_flops = before.cpu_peak_flops if before else None
    if cpu_peak_flops is None and device.type == "cpu" and point.step < last_step:
        cpu_peak_flops = measure_cpu_peak(choose_precision(config.engine.precision, device)[0])
    return Start(
        requested, config, point, num_ranks, record, missing, tuple(notes), began_at, cpu_peak_flops,
        preparation_s, command_end=before.command_end if before else last_step,
        notes_were_said=say is not None, choices_were_said=before is not None,
    )  # fmt: skip


def _find_counted_run(config: Config, point: StartPoint) -> Path | None:
    """The run whose data have been prepared: this one, or the ancestor whose data it takes over; None before that.

    Errors: UserError if the index of the data is damaged.
    """
    return config.run_folder if read_index(config.run_folder) else point.ancestor


def _prepare_and_resolve(requested: Config, rows_per_step: int, num_ranks: int, device: torch.device) -> Config:
    """Prepare the data of a run whose epochs nobody has counted; the config with every phase in steps.

    Errors: UserError, after which no data bind the next start.
    """
    check_epochs_are_countable(requested)
    check_start(requested, device, num_ranks, rows_per_step)
    prepare_run_data(requested, rows_per_step, num_ranks)
    try:
        return resolve_config(requested, rows_per_step)
    except UserError:
        data_index_file(requested.run_folder).unlink()
        raise
