"""All that is open while a run trains: rows, model, engine, records, checkpoints; and what the loop does with them."""

import functools
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import TYPE_CHECKING

import torch

from smoltrain.checkpoint.saver import CheckpointSaver
from smoltrain.config.schema import Config
from smoltrain.data.rows.loader import Loader
from smoltrain.distributed.stop import StopFlag
from smoltrain.distributed.world import World
from smoltrain.engine.engine import Engine
from smoltrain.evaluation.memorisation import find_reason_unknown
from smoltrain.kernels.compile import note_compiled
from smoltrain.model.interface import ComputeOptions
from smoltrain.run.row_ledger import RowLedger
from smoltrain.run.run_folder import RunFolder
from smoltrain.run.run_warnings import (
    communication_share,
    copying_warning,
    memorisation_warning,
    slow_data_warning,
    slow_network_warning,
)
from smoltrain.run.track import Tracker
from smoltrain.schedule import Plan
from smoltrain.train.callbacks import CallbackFailed, StepCallback, run_callbacks
from smoltrain.train.evaluate import evaluate_loss
from smoltrain.train.evaluate_tasks import evaluate_run_tasks
from smoltrain.train.memorise import measure_memorisation
from smoltrain.train.mfu import MfuMeter
from smoltrain.train.sample import sample_prompts
from smoltrain.train.spikes import SpikeGuard
from smoltrain.train.start import Start
from smoltrain.train.step_result import StepResult
from smoltrain.train.watchdog import Watchdog

if TYPE_CHECKING:
    from smoltrain.evaluation.harness import HarnessTasks

RECENT_STEPS = 20  # at least, whose mean is compared with limits that are warned of


@dataclass
class Session:
    """A run that trains, on this rank. Its methods are collective: every rank must call them."""

    start: Start
    config: Config  # with values for what the recipe leaves open
    world: World
    stop: StopFlag
    plan: Plan
    watchdog: Watchdog
    loader: Loader
    engine: Engine
    guard: SpikeGuard
    tracker: Tracker
    saver: CheckpointSaver
    ledger: RowLedger | None  # rank 0 writes it
    folder: RunFolder
    precision: str
    computing: ComputeOptions | None = None  # None: nobody has chosen
    mfu: MfuMeter | None = None  # None where nothing is logged
    num_skipped: int = 0  # updates, since the run began
    saved_step: int = 0  # of the newest checkpoint, published or in the making
    validation_loss: float | None = None  # nats per token, if the last step was evaluated
    recent: deque[StepResult] = field(default_factory=deque)
    compiled_code: str | None = None  # what is compiled in the first step, in all that it depends on
    start_was_logged: bool = False  # how long this start took, which its first line tells
    callbacks: Sequence[StepCallback] = ()
    tasks: "HarnessTasks | None" = None  # of the recipe, on rank 0
    communication_s: float = math.nan  # in which this rank was in collectives, in the last step that was measured
    reads_late: bool = False  # what became of an update: when the next step's passes are under way (step.py)

    def is_anything_due(self, step: int) -> bool:
        """Whether something looks at the state after this step, which must be settled then."""
        config = self.config
        every = (
            config.evaluate.every, config.evaluate.tasks_every, config.evaluate.memorisation_every,
            config.sample.every, config.checkpoint.every,
            config.track.gradients_every,
        )  # fmt: skip
        return bool(self.callbacks) or self.plan.ends_phase(step) or any(self.plan.is_due(step, n) for n in every)

    def record(self, step: int, result: StepResult) -> None:
        """Write down what a step did: metrics, warnings, what the loader met."""
        self.num_skipped += result.num_skipped
        self.validation_loss = None
        self.recent.append(result)
        last_step = self.start.last_step
        metrics: dict[str, float | str] = {**result.metrics, "train/skipped_updates": self.num_skipped}
        metrics |= self._measure_start(result.metrics["speed/step_s"])
        if len(self.recent) == self.recent.maxlen:
            wait_share = mean(recent.metrics["speed/data_wait_share"] for recent in self.recent)
            self.tracker.warn_once("slow data", slow_data_warning(wait_share))
            self.tracker.warn_once("slow network", self._warn_of_network())
        self.tracker.log_step(step, last_step, self.plan.phase(step).name, metrics)
        for note in self.loader.health.take_notes():
            self.tracker.say(note)
        if result.layer_gradients:
            self.tracker.log_gradients(step, result.layer_gradients)
        if result.layer_weights:
            self.tracker.log_weights(step, result.layer_weights)

    def run_callbacks(self, step: int, result: StepResult) -> None:
        """Call the program that this run trains inside, and write down the metrics that it gives.

        Errors: CallbackFailed, once the state after this step is saved.
        """
        try:
            custom = run_callbacks(self.callbacks, step, result.metrics)
        except CallbackFailed:
            self.save(step)
            self.saver.finish()
            raise
        if custom:
            self.tracker.log_metrics(step, {**custom})

    def record_rows(self, result: StepResult) -> None:
        """Write the rows of a step into the ledger, also those that a step which was stopped has consumed."""
        self.watchdog.mark("records")
        if self.ledger:
            self.ledger.append(result.digests)

    def validate(self, step: int) -> bool:
        """Evaluate on the held-out rows. False if a rank is to stop meanwhile: the next start makes up for it."""
        began_s = time.perf_counter()
        batches = self.loader.validation_batches(self.config.evaluate.rows)
        losses = evaluate_loss(self, batches, self._bytes_per_id)
        if losses is None:
            return False
        [took_s] = self.world.max_floats(time.perf_counter() - began_s)
        self.validation_loss, bits_per_byte = losses
        durations = {"speed/evaluation_s": took_s, **self._measure_start(took_s)}
        self.tracker.log_validation(step, self.validation_loss, bits_per_byte, durations)
        if self.recent:
            train_loss = mean(recent.metrics["train/loss_nats_per_token"] for recent in self.recent)
            warning = memorisation_warning(train_loss, self.validation_loss, self.loader.repeat_factor)
            self.tracker.warn_once("memorising", warning)
        return True

    def evaluate_tasks(self, step: int) -> None:
        """Measure the recipe's tasks. Nothing is logged if a rank is to stop meanwhile."""
        began_s = time.perf_counter()
        metrics = evaluate_run_tasks(self, self.tasks)
        if metrics is None:
            return
        [took_s] = self.world.max_floats(time.perf_counter() - began_s)
        self.tracker.log_tasks(step, metrics, {"speed/task_evaluation_s": took_s, **self._measure_start(took_s)})

    def gauge_memorisation(self, step: int) -> None:
        """Measure how much of what the model writes is copied, unless a rank is to stop or nobody can know."""
        if find_reason_unknown(self.loader.prepared):  # which the start has said
            return
        began_s = time.perf_counter()
        found = measure_memorisation(self)
        if found is None:
            return
        [took_s] = self.world.max_floats(time.perf_counter() - began_s)
        self.tracker.log_metrics(step, {**found.metrics(), "speed/memorisation_s": took_s})
        self.tracker.say(f"memorisation at step {step}: {found.describe()}")
        self.tracker.warn_once("copying", copying_warning(found))

    @functools.cached_property
    def _bytes_per_id(self) -> torch.Tensor:
        """UTF-8 bytes of each token, (V,)."""
        return torch.from_numpy(self.loader.prepared.bytes_per_id())

    def sample(self, step: int) -> None:
        """Let the model write after the recipe's prompts."""
        began_s = time.perf_counter()
        texts = sample_prompts(self)
        [took_s] = self.world.max_floats(time.perf_counter() - began_s)
        self.tracker.log_samples(step, texts)
        self.tracker.log_metrics(step, {"speed/sampling_s": took_s})

    def save(self, step: int) -> None:
        """Begin a checkpoint of the state after `step`, unless there is one; it is written beside training."""
        if self.saved_step == step:
            return
        self.watchdog.mark("save")
        if self.ledger:
            self.ledger.sync()
        pause_s = self.saver.start_save(
            step, self.engine, self.loader, skipped_updates=self.num_skipped, precision=self.precision,
            wandb_id=self.folder.wandb_id, identity=self.folder.identity, validation_loss=self.validation_loss,
            validation_rows=self.config.evaluate.rows,
        )  # fmt: skip
        self.saved_step = step
        self.tracker.log_metrics(step, {"speed/checkpoint_pause_s": pause_s})

    def record_closing(self, step: int, closing_s: float) -> None:
        """Write down how long it took to leave the loop, if anything was done in it."""
        if self.start_was_logged:
            self.tracker.log_metrics(step, {"speed/closing_s": closing_s})

    def _warn_of_network(self) -> str | None:
        metrics = [recent.metrics for recent in self.recent]
        return slow_network_warning(
            communication_share(metrics), metrics[-1].get("speed/communication_mb", 0.0),
            each_micro_batch=self.config.engine.reduce_gradients == "micro_batch", num_machines=self.world.num_machines,
        )  # fmt: skip

    def _measure_start(self, work_s: float) -> dict[str, float]:
        """Seconds from the command's start to the first thing that is logged, which took `work_s`; {} afterwards."""
        if self.start_was_logged:
            return {}
        self.start_was_logged = True
        if self.compiled_code and self.world.is_first:
            note_compiled(self.compiled_code)
        return {"speed/start_s": max(0.0, time.time() - self.start.began_at - work_s)}
