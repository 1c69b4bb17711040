"""run(config): the whole of training, in order. The table of contents of the project.

config -> world -> data -> run folder -> model -> engine -> restore -> [step, and what is due after it] -> done
"""

import contextlib
import gc
import os
from collections import deque
from collections.abc import Callable, Iterator
from statistics import mean

import torch

from smoltrain.checkpoint.manifest import WEIGHTS_FILE, describe_last_checkpoint
from smoltrain.checkpoint.restore import restore_checkpoint
from smoltrain.checkpoint.retention import delete_leftovers
from smoltrain.checkpoint.saver import CheckpointSaver
from smoltrain.config.config_file import CONFIG_FILE
from smoltrain.config.schema import Config
from smoltrain.data.rows.open_loader import open_loader
from smoltrain.data.tokenizers.companions import read_generation_config
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.distributed.cpu_cores import bind_to_cpus
from smoltrain.distributed.stop import StopFlag
from smoltrain.distributed.world import World, open_world
from smoltrain.engine.deepspeed_json import read_deepspeed_text, remember_deepspeed_text
from smoltrain.engine.engine import Engine, build_engine
from smoltrain.errors import DONE, STOPPED, RankTrainingStopped, TrainingStopped, UserError
from smoltrain.inference.generate import generate_ids
from smoltrain.inference.load import stop_token_ids
from smoltrain.model.build import build_model
from smoltrain.run.plots import draw_run
from smoltrain.run.row_ledger import LEDGER_FILE, RowLedger
from smoltrain.run.run_folder import accumulation_steps, check_run_folder, enter_run_folder, lock_run_folder
from smoltrain.run.run_warnings import memorisation_warning, slow_data_warning
from smoltrain.run.track import Tracker, open_rank_log
from smoltrain.schedule import Plan
from smoltrain.train.evaluate import evaluate_loss
from smoltrain.train.garbage import collect_between_steps
from smoltrain.train.preflight import check_start
from smoltrain.train.resolve_auto import resolve_auto_settings
from smoltrain.train.spikes import Rewind, SpikeGuard
from smoltrain.train.start import (
    StartPoint,
    copy_ancestor_data,
    copy_generation_config,
    find_start_point,
    is_validation_missing,
    load_initial_weights,
)
from smoltrain.train.step import StepResult, estimate_unique_contents, train_step
from smoltrain.train.watchdog import Watchdog


def run_training(config: Config) -> int:
    """Train until the plan, run.stop_after or a signal ends it; returns the exit code (errors.py). Collective.

    Errors: UserError and TrainingStopped, on every rank alike; RankStopped where one rank cannot write its own files.
    """
    stop = StopFlag()
    remember_deepspeed_text(config.engine.ds_config, read_deepspeed_text(config.engine.ds_config))  # for all lives
    world = open_world(config.engine.device)
    claims = []  # of the run folder, until this process ends
    world.run_on_first_rank(lambda: claims.append(lock_run_folder(config)), patient=True)
    while True:
        try:
            code = train_from_checkpoint(config, world, stop)
            reason = gather_stop_reason(world, stop) if code == DONE else ""
            if reason and world.is_first:  # while W&B was uploading, say
                print(
                    f"stopped at the end of the last step ({reason}); the same command goes on from there", flush=True
                )
            return STOPPED if reason else code
        except OSError as error:  # of this rank's own files: metrics, samples, ledger, log
            raise RankTrainingStopped(
                f"rank {world.rank}: {error}; {describe_last_checkpoint(config.run_folder / 'checkpoints')}"
            ) from None
        except Rewind as rewind:  # what a kill and the same command would do, without new processes
            if world.is_first:
                print(rewind, flush=True)
        gc.collect()  # the engine, whose parts hold each other
        if world.device.type == "cuda":
            torch.cuda.empty_cache()


def train_from_checkpoint(config: Config, world: World, stop: StopFlag) -> int:
    """From what is on disk to the end of the plan or a signal. Collective. Errors: those of `run`, and Rewind."""
    plan = Plan(config.phases)
    last_step = plan.named(config.run.stop_after).last if config.run.stop_after else plan.last_step

    # ---- what is on disk: where to begin, the run's identity, data
    notes: list[str] = []
    world.run_on_first_rank(lambda: notes.extend(delete_leftovers(config.run_folder / "checkpoints")))
    begin = world.run_on_first_rank(lambda: find_start_point(config, notes.append), patient=True)
    done, manifest, held_to = begin.step, begin.manifest, (begin.ancestor, begin.manifest)
    rows_per_step = world.run_on_first_rank(lambda: check_run_folder(config, world.size, done, *held_to))[
        "rows_per_step"
    ]
    world.run_on_first_rank(
        lambda: _prepare_data(config, begin, rows_per_step, world, begins=done < last_step), patient=True
    )
    missed = world.run_on_first_rank(lambda: is_validation_missing(config, begin, last_step))
    if done >= last_step and not missed:
        if world.is_first:
            print(f"{config.run.name}: {_describe_completion(plan, done)}")
        return DONE

    with contextlib.ExitStack() as tracking, contextlib.ExitStack() as opened:
        opened.enter_context(_unlink_index_on_refusal(config, world))
        asked, chosen = config, resolve_auto_settings(config, world, rows_per_step)
        config = chosen.config
        accumulation = accumulation_steps(config, rows_per_step, world.size)
        logs = config.run_folder / "logs"
        open_rank_log(logs / f"rank{world.rank}.log")

        # ---- what trains: rows, model, engine
        watch = Watchdog(logs, world.rank, world.size, config.engine.hang_s)
        opened.callback(watch.close)
        watch.begin(done)
        if world.device.type == "cpu":  # a GPU's ranks leave it to their launcher, which may know what is near it
            opened.enter_context(bind_to_cpus(world.cpu_share.cpus))
        loader = open_loader(config, world.rank, world.size, rows_per_step=rows_per_step, accumulation=accumulation)
        opened.callback(loader.close)
        torch.manual_seed(config.run.seed)  # the same weights on every rank
        decoder = build_model(config.model, chosen.computing, document_mask=config.packing.document_mask)
        if begin.weights_from:
            load_initial_weights(begin, config, decoder, loader.prepared.tokenizer)
        torch.manual_seed(config.run.seed + 1 + world.rank)  # other dropout on each
        watch.mark("engine")
        wrapped = build_engine(
            decoder, config, world, precision=chosen.precision, accumulation=accumulation,
            compiles=chosen.computing.compiles,
        )  # fmt: skip

        # ---- where it left off
        watch.mark("restore")
        if manifest and begin.checkpoint:
            restore_checkpoint(begin.checkpoint, manifest, wrapped, loader, world, seed=config.run.seed)

        # ---- nothing refuses any more: what the run writes down
        watch.mark("records")
        folder = world.run_on_first_rank(lambda: enter_run_folder(asked, world.size, done, *held_to))
        if begin.manifest is None:
            world.run_on_first_rank(
                lambda: copy_generation_config(begin, config, loader.prepared.tokenizer, notes.append)
            )
        tracker = tracking.enter_context(Tracker(config, folder, world.rank, done, last_step))
        for note in notes:
            tracker.say(note)
        for what, value in (
            ("run", folder.path),
            ("device", _describe_device(world)),
            *chosen.reasons.items(),
            ("gradients", wrapped.gradient_reduction_summary),
            ("engine", f"DeepSpeed ZeRO-{wrapped.stage}, from {config.engine.ds_config}"),
            ("parameters", f"{chosen.num_parameters:,}"),
            ("rows per step", _describe_rows_per_step(config, folder.rows_per_step, accumulation, world)),
            ("tokenizer", loader.prepared.describe_tokenizer()),
            ("data", loader.prepared.describe()),
            ("packing", PACKING_IN_WORDS[config.packing.document_mask]),
            ("plan", ", ".join(f"{p.name} {p.first}-{p.last}" for p in plan.phases)),
        ):
            tracker.say_choice(what, str(value))
        if os.environ.get("CUDA_LAUNCH_BLOCKING", "0") != "0":
            tracker.say("WARNING: CUDA_LAUNCH_BLOCKING is set: every kernel waits for the one before; unset it")
        if folder.changes:
            tracker.say_choice("changed", "; ".join(folder.changes))
        if manifest:
            tracker.say(f"restored step {done} on {world.size} ranks, ledger {loader.ledger[:16]}")
        skipped = manifest.skipped_updates if manifest else 0
        rows_ledger = None
        if world.is_first:
            rows_ledger = RowLedger(folder.path / LEDGER_FILE, loader.rows_consumed)
            opened.callback(rows_ledger.close)
            if lost := rows_ledger.num_lost_rows:
                tracker.say(f"WARNING: {LEDGER_FILE} has lost {lost:,} rows, as `smoltrain verify` will say")
        bytes_per_id = torch.from_numpy(loader.prepared.bytes_per_id())
        recent: deque[StepResult] = deque(maxlen=max(20, config.track.print_every))
        guard = SpikeGuard.open(folder.path, config.spikes, world, step=done)
        saver = CheckpointSaver(
            folder.path / "checkpoints", world, plan, config.checkpoint, say=tracker.say,
            published=lambda step, path: tracker.log_model(step, path / WEIGHTS_FILE, ends_phase=plan.ends_phase(step)),
        )  # fmt: skip
        opened.callback(saver.close)
        opened.enter_context(publish_pending_on_error(saver))
        saved = done

        def save(step: int, validation_loss: float | None) -> None:
            watch.mark("save")
            if rows_ledger:
                rows_ledger.sync()
            pause_s = saver.start_save(
                step, wrapped, loader, skipped_updates=skipped, precision=chosen.precision, wandb_id=folder.wandb_id,
                identity=folder.identity, validation_loss=validation_loss, validation_rows=config.evaluate.rows,
            )  # fmt: skip
            tracker.log_metrics(step, {"speed/checkpoint_pause_s": pause_s})

        def validate(step: int) -> float | None:
            rows = loader.validation_batches(config.evaluate.rows)
            found = evaluate_loss(wrapped, rows, bytes_per_id, world, stop=stop.is_raised, mark=watch.mark)
            if found is None:  # asked to stop meanwhile: made up for at the next start
                return None
            tracker.log_validation(step, *found)
            return found[0]

        if missed and validate(done) is None:
            tracker.say(f"stopped before step {done + 1}; the same command goes on from there")
            return STOPPED

        # ---- the loop
        collect = opened.enter_context(collect_between_steps())
        for step in range(done + 1, last_step + 1):
            watch.begin(step)
            result = train_step(
                step, wrapped, loader, plan, world, config.track.gradients_every, guard=guard,
                stop=stop.is_raised, say=tracker.say, mark=watch.mark,
                spent=rows_ledger.append if rows_ledger else lambda _: None,
            )  # fmt: skip
            if result is None:  # asked to stop while the data were out of reach
                if saved < step - 1:
                    save(step - 1, None)
                saver.finish()
                tracker.say(f"stopped after step {step - 1}, waiting for data; the same command goes on from there")
                return STOPPED
            saver.poll()
            skipped += result.num_skipped
            recent.append(result)
            if rows_ledger:
                rows_ledger.append(result.digests)
            due_now = step % config.track.print_every == 0 or step == last_step
            more: dict[str, float | str] = {"train/skipped_updates": skipped}
            if due_now:
                more["data/unique_contents"] = estimate_unique_contents(loader, world)
            if len(recent) == recent.maxlen:
                tracker.warn_once(
                    "slow data", slow_data_warning(mean(r.metrics["speed/data_wait_share"] for r in recent))
                )
            tracker.log_step(step, last_step, plan.phase(step).name, result.metrics | more)
            for note in loader.health.take_notes():
                tracker.say(note)
            if result.layers:
                tracker.log_gradients(step, result.layers)

            validation_loss = validate(step) if plan.is_due(step, config.evaluate.every) else None
            if validation_loss is not None:
                train_loss = mean(r.metrics["train/loss_nats_per_token"] for r in recent)
                tracker.warn_once("memorising", memorisation_warning(train_loss, validation_loss, loader.repeat_factor))
            if plan.is_due(step, config.sample.every):
                texts = sample_prompts(
                    wrapped, loader.prepared.tokenizer, config, world, stop=stop.is_raised, mark=watch.mark
                )
                tracker.log_samples(step, texts)

            collect(step)
            watch.mark("reduction")
            stopping = world.sum_ints(stop.is_raised())[0] > 0
            if plan.is_due(step, config.checkpoint.every) or plan.ends_phase(step) or stopping:
                save(step, validation_loss)
                saved = step
                stopping = stopping or world.sum_ints(stop.is_raised())[0] > 0  # meanwhile: no further phase begins
            if stopping and step < last_step:
                saver.finish()
                reason = gather_stop_reason(world, stop)
                tracker.say(f"stopped after step {step} ({reason}); the same command goes on from there")
                return STOPPED

        watch.mark("save")
        saver.finish()
        if world.is_first:
            draw_run(plan, folder.path)
        if reason := gather_stop_reason(world, stop):
            tracker.say(f"stopped after step {last_step} ({reason}); the same command goes on from there")
            return STOPPED
        tracker.say(
            f"{config.run.name}: {_describe_completion(plan, last_step)}; the curves are in {folder.path / 'plots'}"
        )
        return DONE


def gather_stop_reason(world: World, stop: StopFlag) -> str:
    """Why the lowest of the ranks that were asked to stop was; '' if none was. Collective."""
    stopping = world.sum_ints(stop.is_raised())[0] > 0
    return next(reason for reason in world.gather(stop.reason) if reason) if stopping else ""


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


def sample_prompts(
    engine: Engine, tokenizer: Tokenizer, config: Config, world: World,
    *, stop: Callable[[], bool] = lambda: False, mark: Callable[[str], None] = lambda _: None,
) -> list[tuple[str, str]]:  # fmt: skip
    """(prompt, continuation) for each prompt, as far as nobody asks to stop.

    Every rank samples the same text, as ZeRO-3's forward is collective.
    """
    banned = tokenizer.unused_ids(config.model.vocab_size)
    ends = stop_token_ids(tokenizer, read_generation_config(config.run_folder / "tokenizer"))
    texts = []
    for prompt in config.sample.prompts:
        mark("sampling")
        if world.sum_ints(stop())[0]:
            break
        ids = tokenizer.encode(prompt) or [tokenizer.separator_id]
        with engine.evaluation_mode():
            new = generate_ids(
                engine.module, ids, config.generation, stop_ids=ends,
                banned_ids=banned, seed=config.run.seed,
            )  # fmt: skip
            texts.append((prompt, tokenizer.decode(list(new))))
    return texts


def _prepare_data(config: Config, begin: StartPoint, rows_per_step: int, world: World, *, begins: bool) -> None:
    """Tokenise what is not yet; nothing is returned, for nothing but a word of success should travel to the ranks."""
    if begins and "SMOLTRAIN_SUPERVISOR" not in os.environ:  # which has looked already
        check_start(config, world.device, world.size, rows_per_step)
    copy_ancestor_data(config, begin)
    prepare_run_data(config, rows_per_step, world.size)


PACKING_IN_WORDS = {
    False: "documents are chopped into rows and see each other there; packing.document_mask=true keeps them apart",
    True: "documents are chopped into rows; attention and positions stay within each, as packing.document_mask asks",
}


def _describe_rows_per_step(config: Config, rows_per_step: int, accumulation: int, world: World) -> str:
    split = f"{config.batch.micro_batch_rows} x {accumulation} accumulated x {world.size} ranks"
    return f"{rows_per_step} = {split} = {rows_per_step * config.batch.sequence_length:,} tokens"


def _describe_device(world: World) -> str:
    match world.device.type:
        case "cuda":
            return f"{world.size} x {torch.cuda.get_device_name(world.device)}, NCCL"
        case "mps":
            return "1 rank on Apple's MPS, best effort: DeepSpeed there was never tried by us; engine.device=cpu is"
    found = "CUDA was not asked for" if torch.cuda.is_available() else "no CUDA device was found"
    hint = "; engine.device=mps would try this machine's GPU" if torch.backends.mps.is_available() else ""
    ranks = f"{world.size} CPU rank{'s' * (world.size > 1)}"
    each = f"{world.cpu_share.threads} thread{'s' * (world.cpu_share.threads > 1)} each, {world.cpu_share.how}"
    return f"{ranks}, {each}, gloo; {found}{hint}"


def _describe_completion(plan: Plan, done: int) -> str:
    if done >= plan.last_step:
        return f"the plan is complete ({plan.last_step} steps)"
    return f"phase {plan.phase(done).name} is complete (step {done} of {plan.last_step})"
