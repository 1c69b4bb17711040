"""Open all that a run trains with, in the order in which it may be refused, and close it at the end."""

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from smoltrain.checkpoint.free_space import check_room
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
from smoltrain.engine.build_engine import build_engine
from smoltrain.engine.engine import Engine
from smoltrain.errors import TrainingStopped, UserError
from smoltrain.kernels.compile import build_headers_in_background
from smoltrain.model.build import build_model
from smoltrain.run.private_folders import find_unseen_ranks
from smoltrain.run.rank_log import open_rank_log
from smoltrain.run.row_ledger import LEDGER_FILE, RowLedger
from smoltrain.run.run_folder import RunFolder, accumulation_steps, write_run_folder
from smoltrain.run.track import Tracker
from smoltrain.schedule import Plan
from smoltrain.training.callbacks import StepCallback
from smoltrain.training.derived_facts import derive_facts
from smoltrain.training.describe import name_compiled_code, say_start
from smoltrain.training.initial_weights import copy_generation_config, load_initial_weights
from smoltrain.training.mfu import MfuMeter, open_mfu_meter
from smoltrain.training.resolve_auto import ResolvedSettings, resolve_auto_settings
from smoltrain.training.run_tasks import load_run_tasks
from smoltrain.training.session import RECENT_STEPS, Session
from smoltrain.training.spikes import Rewind, SpikeGuard
from smoltrain.training.start import Start
from smoltrain.training.step_recorder import RecordingWatchdog, name_layers, open_watchdog
from smoltrain.training.watchdog import Watchdog


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
        watchdog = open_watchdog(logs, world, config.engine.hang_s, find_unseen_ranks(config, world))
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
        notes: list[str] = []
        tasks = load_run_tasks(config, world, notes.append)

        # ---- where it left off
        watchdog.mark("restore")
        if start.point.manifest and start.point.checkpoint:
            seed = config.run.seed
            restore_checkpoint(start.point.checkpoint, start.point.manifest, engine, loader, world, seed=seed)

        if done < start.last_step:  # known now, or when the steps until the first checkpoint would be lost
            check_room(config.run_folder, engine.checkpoint_bytes, world, config.checkpoint)

        # ---- nothing refuses any more: what the run writes down
        watchdog.mark("records")
        folder = world.run_on_first_rank(lambda: write_run_folder(start.config, world.size, start.record))
        if start.point.manifest is None:
            tokenizer = loader.prepared.tokenizer
            source = start.point.weights_from
            world.run_on_first_rank(lambda: copy_generation_config(source, config, tokenizer, notes.append))
        tracker = tracking.enter_context(_open_tracker(start, settings, loader, engine, world, mfu, folder))
        for note in start.notes:
            (tracker.write_log if start.notes_were_said else tracker.say)(note)
        for note in notes:
            tracker.say(note)
        say_start(start, settings, folder, loader, engine, world, tracker)
        tracker.say_choice("peak", mfu.description)
        ledger = _open_ledger(folder, loader, world, tracker)
        if ledger:
            opened.callback(ledger.close)
        guard = SpikeGuard.open(folder.path, config.spikes, world, step=done)

        def log_published(step: int, checkpoint: Path) -> None:
            tracker.log_model(step, checkpoint / WEIGHTS_FILE, ends_phase=plan.ends_phase(step))

        checkpoints = folder.path / "checkpoints"
        saver = CheckpointSaver(checkpoints, world, plan, config.checkpoint, say=tracker.say, published=log_published)
        opened.callback(saver.close)
        opened.enter_context(publish_pending_on_error(saver))
        yield Session(
            start, config, world, stop, plan, watchdog, loader, engine, guard, tracker, saver, ledger, folder,
            settings.precision, settings.computing, mfu,
            num_skipped=start.point.manifest.skipped_updates if start.point.manifest else 0,
            saved_step=done,
            recent=deque(maxlen=max(RECENT_STEPS, config.track.print_every)), callbacks=callbacks,
            compiled_code=name_compiled_code(settings, loader, world) if settings.computing.compiles else None,
            tasks=tasks,
            reads_late=world.device.type == "cuda" and engine.decides_on_device,
        )  # fmt: skip


def _open_tracker(
    start: Start, settings: ResolvedSettings, loader: Loader, engine: Engine, world: World, mfu: MfuMeter,
    folder: RunFolder,
) -> Tracker:  # fmt: skip
    return Tracker(
        settings.config, folder, world.rank, start.point.step, start.command_end,
        choices_were_said=start.choices_were_said,
        derived=derive_facts(start, settings, loader, engine, world, mfu),
    )  # fmt: skip


def _open_ledger(folder: RunFolder, loader: Loader, world: World, tracker: Tracker) -> RowLedger | None:
    """Rank 0's, which says what it has lost."""
    if not world.is_first:
        return None
    ledger = RowLedger(folder.path / LEDGER_FILE, loader.rows_consumed)
    if ledger.num_lost_rows:
        tracker.say(f"WARNING: {LEDGER_FILE} has lost {ledger.num_lost_rows:,} rows, as `smoltrain verify` will say")
    return ledger


def _build_engine(start: Start, settings: ResolvedSettings, loader: Loader, world: World, watchdog: Watchdog) -> Engine:
    """The model with its first weights, in the engine that trains it. Collective."""
    config = settings.config
    if settings.computing.compiles and world.device.type == "cpu" and world.local_rank == 0:
        build_headers_in_background()  # an error would come again with the first kernel
    torch.manual_seed(config.run.seed)  # the same weights on every rank
    model = build_model(config.model, settings.computing, document_mask=config.packing.document_mask)
    if start.point.weights_from:
        load_initial_weights(start.point.weights_from, config, model, loader.prepared.tokenizer)
    if isinstance(watchdog, RecordingWatchdog) and not settings.computing.compiles:
        name_layers(model)
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
