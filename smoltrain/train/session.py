"""All that is open while a run trains: rows, model, engine, records, checkpoints; and what the loop does with them."""

import contextlib
import functools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import torch

from smoltrain.checkpoint.manifest import WEIGHTS_FILE
from smoltrain.checkpoint.restore import restore_checkpoint
from smoltrain.checkpoint.saver import CheckpointSaver
from smoltrain.config.config_file import CONFIG_FILE
from smoltrain.config.schema import Config
from smoltrain.data.rows.loader import Loader
from smoltrain.data.rows.open_loader import open_loader
from smoltrain.distributed.cpu_cores import bind_to_cpus
from smoltrain.distributed.stop import StopFlag
from smoltrain.distributed.world import World
from smoltrain.engine.engine import Engine, build_engine
from smoltrain.errors import TrainingStopped, UserError
from smoltrain.evaluation.memorisation import find_reason_unknown
from smoltrain.kernels.compile import build_headers_in_background, note_compiled
from smoltrain.model.build import build_model
from smoltrain.run.private_folders import find_unseen_ranks
from smoltrain.run.row_ledger import LEDGER_FILE, RowLedger
from smoltrain.run.run_folder import RunFolder, accumulation_steps, write_run_folder
from smoltrain.run.run_warnings import copying_warning, memorisation_warning, slow_data_warning
from smoltrain.run.track import Tracker, open_rank_log
from smoltrain.schedule import Plan
from smoltrain.train.callbacks import CallbackFailed, StepCallback, run_callbacks
from smoltrain.train.describe import name_compiled_code, say_start
from smoltrain.train.evaluate import evaluate_loss
from smoltrain.train.initial_weights import copy_generation_config, load_initial_weights
from smoltrain.train.memorise import measure_memorisation
from smoltrain.train.mfu import MfuMeter, open_mfu_meter
from smoltrain.train.resolve_auto import ResolvedSettings, resolve_auto_settings
from smoltrain.train.sample import sample_prompts
from smoltrain.train.spikes import Rewind, SpikeGuard
from smoltrain.train.start import Start
from smoltrain.train.step_result import StepResult
from smoltrain.train.watchdog import Watchdog

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
    mfu: MfuMeter | None = None  # None where nothing is logged
    num_skipped: int = 0  # updates, since the run began
    saved_step: int = 0  # of the newest checkpoint, published or in the making
    validation_loss: float | None = None  # nats per token, if the last step was evaluated
    recent: deque[StepResult] = field(default_factory=deque)
    compiled_code: str | None = None  # what is compiled in the first step, in all that it depends on
    start_was_logged: bool = False  # how long this start took, which its first line tells
    callbacks: Sequence[StepCallback] = ()
    reads_late: bool = False  # what became of an update: when the next step's passes are under way (step.py)

    def is_anything_due(self, step: int) -> bool:
        """Whether something looks at the state after this step, which must be settled then."""
        config = self.config
        every = (
            config.evaluate.every, config.evaluate.memorisation_every, config.sample.every, config.checkpoint.every,
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
        self.tracker.log_step(step, last_step, self.plan.phase(step).name, metrics)
        for note in self.loader.health.take_notes():
            self.tracker.say(note)
        if result.layer_gradients:
            self.tracker.log_gradients(step, result.layer_gradients)

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

    def _measure_start(self, work_s: float) -> dict[str, float]:
        """Seconds from the command's start to the first thing that is logged, which took `work_s`; {} afterwards."""
        if self.start_was_logged:
            return {}
        self.start_was_logged = True
        if self.compiled_code and self.world.is_first:
            note_compiled(self.compiled_code)
        return {"speed/start_s": max(0.0, time.time() - self.start.began_at - work_s)}


@contextlib.contextmanager
def open_session(
    start: Start, world: World, stop: StopFlag, callbacks: Sequence[StepCallback] = ()
) -> Iterator[Session]:
    """Open all that `start` needs, in the order in which it may be refused; everything is closed at the end.

    Nothing is written into the run's folder (but logs) before nothing refuses any more. Collective.
    Errors: UserError for what cannot run here or does not fit the checkpoint.
    """
    with contextlib.ExitStack() as tracking, contextlib.ExitStack() as opened:  # the tracker is closed last of all
        opened.enter_context(_unlink_index_on_refusal(start.config, world))
        settings = resolve_auto_settings(start.config, world, start.rows_per_step)
        config = settings.config
        plan = Plan(config.phases)
        done = start.point.step
        logs = config.run_folder / "logs"
        open_rank_log(logs / f"rank{world.rank}.log")

        # ---- what trains: rows, model, engine
        watchdog = Watchdog(logs, world.rank, world.size, config.engine.hang_s, find_unseen_ranks(config, world))
        opened.callback(watchdog.close)
        watchdog.begin_step(done)
        mfu = open_mfu_meter(config, start.cpu_peak_flops, settings.precision, world)  # before ranks are bound to cores
        if world.device.type == "cpu":  # a GPU's ranks leave it to their launcher, which may know what is near it
            opened.enter_context(bind_to_cpus(world.cpu_share.cpus))
        accumulation = accumulation_steps(config, start.rows_per_step, world.size)
        loader = open_loader(
            config, world.rank, world.size, rows_per_step=start.rows_per_step, accumulation=accumulation
        )
        opened.callback(loader.close)
        engine = _build_engine(start, settings, loader, world, watchdog)

        # ---- where it left off
        watchdog.mark("restore")
        if start.point.manifest and start.point.checkpoint:
            seed = config.run.seed
            restore_checkpoint(start.point.checkpoint, start.point.manifest, engine, loader, world, seed=seed)

        # ---- nothing refuses any more: what the run writes down
        watchdog.mark("records")
        folder = world.run_on_first_rank(lambda: write_run_folder(start.config, world.size, start.record))
        notes: list[str] = []
        if start.point.manifest is None:
            source = start.point.weights_from
            tokenizer = loader.prepared.tokenizer
            world.run_on_first_rank(lambda: copy_generation_config(source, config, tokenizer, notes.append))
        tracker = tracking.enter_context(
            Tracker(config, folder, world.rank, done, start.command_end, choices_were_said=start.choices_were_said)
        )
        for note in start.notes:
            (tracker.write_log if start.notes_were_said else tracker.say)(note)
        for note in notes:
            tracker.say(note)
        say_start(start, settings, folder, loader, engine, world, tracker)
        tracker.say_choice("peak", mfu.description)
        ledger = None
        if world.is_first:
            ledger = RowLedger(folder.path / LEDGER_FILE, loader.rows_consumed)
            opened.callback(ledger.close)
            if ledger.num_lost_rows:
                lost = f"WARNING: {LEDGER_FILE} has lost {ledger.num_lost_rows:,} rows, as `smoltrain verify` will say"
                tracker.say(lost)
        guard = SpikeGuard.open(folder.path, config.spikes, world, step=done)

        def log_published(step: int, checkpoint: Path) -> None:
            tracker.log_model(step, checkpoint / WEIGHTS_FILE, ends_phase=plan.ends_phase(step))

        checkpoints = folder.path / "checkpoints"
        saver = CheckpointSaver(checkpoints, world, plan, config.checkpoint, say=tracker.say, published=log_published)
        opened.callback(saver.close)
        opened.enter_context(publish_pending_on_error(saver))
        yield Session(
            start, config, world, stop, plan, watchdog, loader, engine, guard, tracker, saver, ledger, folder,
            settings.precision, mfu,
            num_skipped=start.point.manifest.skipped_updates if start.point.manifest else 0,
            saved_step=done,
            recent=deque(maxlen=max(RECENT_STEPS, config.track.print_every)), callbacks=callbacks,
            compiled_code=name_compiled_code(settings, loader, world) if settings.computing.compiles else None,
            reads_late=world.device.type == "cuda" and engine.decides_on_device,
        )  # fmt: skip


def _build_engine(start: Start, settings: ResolvedSettings, loader: Loader, world: World, watchdog: Watchdog) -> Engine:
    """The model with its first weights, in the engine that trains it. Collective."""
    config = settings.config
    if settings.computing.compiles and world.device.type == "cpu" and world.local_rank == 0:
        build_headers_in_background()  # an error would come again with the first kernel
    torch.manual_seed(config.run.seed)  # the same weights on every rank
    model = build_model(config.model, settings.computing, document_mask=config.packing.document_mask)
    if start.point.weights_from:
        load_initial_weights(start.point.weights_from, config, model, loader.prepared.tokenizer)
    torch.manual_seed(config.run.seed + 1 + world.rank)  # other dropout on each
    watchdog.mark("engine")
    return build_engine(
        model, config, world, precision=settings.precision, accumulation=loader.layout.accumulation,
        compiles=settings.computing.compiles, reduction=settings.reduction,
    )  # fmt: skip


@contextlib.contextmanager
def _unlink_index_on_refusal(config: Config, world: World) -> Iterator[None]:
    """A start that is refused before the run ever began binds nobody: other data may be prepared in its folder.

    What was tokenised stays, and a start with the same data finds it.
    """
    try:
        yield
    except UserError:
        if world.is_first and not (config.run_folder / CONFIG_FILE).exists():
            (config.run_folder / "data" / "index.json").unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def publish_pending_on_error(saver: CheckpointSaver) -> Iterator[None]:
    """On an error that all ranks raise alike, what is still being written is published before they leave."""
    try:
        yield
    except (Rewind, TrainingStopped, UserError):
        saver.finish()
        raise
