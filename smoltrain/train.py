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

from smoltrain import (
    advice,
    beforehand,
    checkpoint,
    choices,
    cores,
    data,
    dist,
    ds_config,
    engine,
    garbage,
    ledger,
    loading,
    model,
    origin,
    plots,
    runfolder,
    track,
)
from smoltrain.checkpoint import WEIGHTS, Saver
from smoltrain.data import companions
from smoltrain.data.tokenizer import Tokenizer
from smoltrain.dist import StopFlag, World
from smoltrain.engine import Engine
from smoltrain.errors import DONE, STOPPED, RankStopped, TrainingStopped, UserError
from smoltrain.generate import generate
from smoltrain.plan import Plan
from smoltrain.schema import Config
from smoltrain.spikes import Guard, Rewind
from smoltrain.step import StepResult, count_contents, evaluate, train_step
from smoltrain.watchdog import Watchdog


def run(config: Config) -> int:
    """Train until the plan, run.stop_after or a signal ends it; returns the exit code (errors.py). Collective.

    Errors: UserError and TrainingStopped, on every rank alike; RankStopped where one rank cannot write its own files.
    """
    stop = StopFlag()
    ds_config.remember(config.engine.ds_config, ds_config.text(config.engine.ds_config))  # for all lives
    world = dist.open(config.engine.device)
    claims = []  # of the run folder, until this process ends
    world.on_first(lambda: claims.append(runfolder.claim(config)), patient=True)
    while True:
        try:
            code = life(config, world, stop)
            reason = reason_to_stop(world, stop) if code == DONE else ""
            if reason and world.is_first:  # while W&B was uploading, say
                print(
                    f"stopped at the end of the last step ({reason}); the same command goes on from there", flush=True
                )
            return STOPPED if reason else code
        except OSError as error:  # of this rank's own files: metrics, samples, ledger, log
            raise RankStopped(
                f"rank {world.rank}: {error}; {checkpoint.left(config.run_folder / 'checkpoints')}"
            ) from None
        except Rewind as rewind:  # what a kill and the same command would do, without new processes
            if world.is_first:
                print(rewind, flush=True)
        gc.collect()  # the engine, whose parts hold each other
        if world.device.type == "cuda":
            torch.cuda.empty_cache()


def life(config: Config, world: World, stop: StopFlag) -> int:
    """From what is on disk to the end of the plan or a signal. Collective. Errors: those of `run`, and Rewind."""
    plan = Plan(config.phases)
    last_step = plan.named(config.run.stop_after).last if config.run.stop_after else plan.last_step

    # ---- what is on disk: where to begin, the run's identity, data
    notes: list[str] = []
    world.on_first(lambda: notes.extend(checkpoint.sweep(config.run_folder / "checkpoints")))
    begin = world.on_first(lambda: origin.find(config, notes.append), patient=True)
    done, manifest, held_to = begin.step, begin.manifest, (begin.ancestor, begin.manifest)
    rows_per_step = world.on_first(lambda: runfolder.check(config, world.size, done, *held_to))["rows_per_step"]
    world.on_first(lambda: _prepare(config, begin, rows_per_step, world, begins=done < last_step), patient=True)
    missed = world.on_first(lambda: origin.misses_validation(config, begin, last_step))
    if done >= last_step and not missed:
        if world.is_first:
            print(f"{config.run.name}: {_complete(plan, done)}")
        return DONE

    with contextlib.ExitStack() as tracking, contextlib.ExitStack() as opened:
        opened.enter_context(_binding_once_begun(config, world))
        asked, chosen = config, choices.choose(config, world, rows_per_step)
        config = chosen.config
        accumulation = runfolder.accumulation(config, rows_per_step, world.size)
        logs = config.run_folder / "logs"
        track.rank_log(logs / f"rank{world.rank}.log")

        # ---- what trains: rows, model, engine
        watch = Watchdog(logs, world.rank, world.size, config.engine.hang_s)
        opened.callback(watch.close)
        watch.begin(done)
        if world.device.type == "cpu":  # a GPU's ranks leave it to their launcher, which may know what is near it
            opened.enter_context(cores.bound(world.share.cpus))
        loader = data.open(config, world.rank, world.size, rows_per_step=rows_per_step, accumulation=accumulation)
        opened.callback(loader.close)
        torch.manual_seed(config.run.seed)  # the same weights on every rank
        decoder = model.build(config.model, chosen.computing, document_mask=config.packing.document_mask)
        if begin.weights_from:
            origin.load_weights(begin, config, decoder, loader.prepared.tokenizer)
        torch.manual_seed(config.run.seed + 1 + world.rank)  # other dropout on each
        watch.mark("engine")
        wrapped = engine.wrap(
            decoder, config, world, precision=chosen.precision, accumulation=accumulation,
            compiles=chosen.computing.compiles,
        )  # fmt: skip

        # ---- where it left off
        watch.mark("restore")
        if manifest and begin.checkpoint:
            checkpoint.restore(begin.checkpoint, manifest, wrapped, loader, world, seed=config.run.seed)

        # ---- nothing refuses any more: what the run writes down
        watch.mark("records")
        folder = world.on_first(lambda: runfolder.enter(asked, world.size, done, *held_to))
        if begin.manifest is None:
            world.on_first(lambda: origin.keep_generation(begin, config, loader.prepared.tokenizer, notes.append))
        tracker = tracking.enter_context(track.open(config, folder, world.rank, done, last_step))
        for note in notes:
            tracker.say(note)
        for what, value in (
            ("run", folder.path),
            ("device", _device(world)),
            *chosen.reasons.items(),
            ("gradients", wrapped.gradients_travel),
            ("engine", f"DeepSpeed ZeRO-{wrapped.stage}, from {config.engine.ds_config}"),
            ("parameters", f"{chosen.num_parameters:,}"),
            ("rows per step", _rows(config, folder.rows_per_step, accumulation, world)),
            ("tokenizer", loader.prepared.describe_tokenizer()),
            ("data", loader.prepared.describe()),
            ("packing", PACKING[config.packing.document_mask]),
            ("plan", ", ".join(f"{p.name} {p.first}-{p.last}" for p in plan.phases)),
        ):
            tracker.chosen(what, str(value))
        if os.environ.get("CUDA_LAUNCH_BLOCKING", "0") != "0":
            tracker.say("WARNING: CUDA_LAUNCH_BLOCKING is set: every kernel waits for the one before; unset it")
        if folder.changes:
            tracker.chosen("changed", "; ".join(folder.changes))
        if manifest:
            tracker.say(f"restored step {done} on {world.size} ranks, ledger {loader.ledger[:16]}")
        skipped = manifest.skipped_updates if manifest else 0
        rows_ledger = None
        if world.is_first:
            rows_ledger = ledger.Ledger(folder.path / ledger.FILE, loader.rows_consumed)
            opened.callback(rows_ledger.close)
            if rows_ledger.lost:
                tracker.say(
                    f"WARNING: {ledger.FILE} has lost {rows_ledger.lost:,} rows, as `smoltrain verify` will say"
                )
        bytes_per_id = torch.from_numpy(loader.prepared.bytes_per_id())
        recent: deque[StepResult] = deque(maxlen=max(20, config.track.print_every))
        guard = Guard.open(folder.path, config.spikes, world, step=done)
        saver = Saver(
            folder.path / "checkpoints", world, plan, config.checkpoint, say=tracker.say,
            published=lambda step, path: tracker.model(step, path / WEIGHTS, ends_phase=plan.ends_phase(step)),
        )  # fmt: skip
        opened.callback(saver.close)
        opened.enter_context(finishing(saver))
        saved = done

        def save(step: int, validation_loss: float | None) -> None:
            watch.mark("save")
            if rows_ledger:
                rows_ledger.sync()
            pause_s = saver.begin(
                step, wrapped, loader, skipped_updates=skipped, precision=chosen.precision, wandb_id=folder.wandb_id,
                identity=folder.identity, validation_loss=validation_loss, validation_rows=config.evaluate.rows,
            )  # fmt: skip
            tracker.metrics(step, {"speed/checkpoint_pause_s": pause_s})

        def validate(step: int) -> float | None:
            rows = loader.validation(config.evaluate.rows)
            found = evaluate(wrapped, rows, bytes_per_id, world, stop=stop.is_raised, mark=watch.mark)
            if found is None:  # asked to stop meanwhile: made up for at the next start
                return None
            tracker.validation(step, *found)
            return found[0]

        if missed and validate(done) is None:
            tracker.say(f"stopped before step {done + 1}; the same command goes on from there")
            return STOPPED

        # ---- the loop
        collect = opened.enter_context(garbage.by_hand())
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
                more["data/unique_contents"] = count_contents(loader, world)
            if len(recent) == recent.maxlen:
                tracker.warn("slow data", advice.slow_data(mean(r.metrics["speed/data_wait_share"] for r in recent)))
            tracker.step(step, last_step, plan.phase(step).name, result.metrics | more)
            for note in loader.health.notes():
                tracker.say(note)
            if result.layers:
                tracker.gradients(step, result.layers)

            validation_loss = validate(step) if plan.due(step, config.evaluate.every) else None
            if validation_loss is not None:
                train_loss = mean(r.metrics["train/loss_nats_per_token"] for r in recent)
                tracker.warn("memorising", advice.memorising(train_loss, validation_loss, loader.repeat_factor))
            if plan.due(step, config.sample.every):
                texts = sample(wrapped, loader.prepared.tokenizer, config, world, stop=stop.is_raised, mark=watch.mark)
                tracker.samples(step, texts)

            collect(step)
            watch.mark("reduction")
            stopping = world.sum_ints(stop.is_raised())[0] > 0
            if plan.due(step, config.checkpoint.every) or plan.ends_phase(step) or stopping:
                save(step, validation_loss)
                saved = step
                stopping = stopping or world.sum_ints(stop.is_raised())[0] > 0  # meanwhile: no further phase begins
            if stopping and step < last_step:
                saver.finish()
                reason = reason_to_stop(world, stop)
                tracker.say(f"stopped after step {step} ({reason}); the same command goes on from there")
                return STOPPED

        watch.mark("save")
        saver.finish()
        if world.is_first:
            plots.run_pngs(plan, folder.path)
        if reason := reason_to_stop(world, stop):
            tracker.say(f"stopped after step {last_step} ({reason}); the same command goes on from there")
            return STOPPED
        tracker.say(f"{config.run.name}: {_complete(plan, last_step)}; the curves are in {folder.path / 'plots'}")
        return DONE


def reason_to_stop(world: World, stop: StopFlag) -> str:
    """Why the lowest of the ranks that were asked to stop was; '' if none was. Collective."""
    stopping = world.sum_ints(stop.is_raised())[0] > 0
    return next(reason for reason in world.gather(stop.reason) if reason) if stopping else ""


@contextlib.contextmanager
def _binding_once_begun(config: Config, world: World) -> Iterator[None]:
    """A start that is refused before the run ever began binds nobody: other data may be prepared in its folder.

    What was tokenised stays, and a start with the same data finds it.
    """
    try:
        yield
    except UserError:
        if world.is_first and not (config.run_folder / runfolder.CONFIG).exists():
            (config.run_folder / "data" / "index.json").unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def finishing(saver: Saver) -> Iterator[None]:
    """On an error that all ranks raise alike, what is still being written is published before they leave."""
    try:
        yield
    except (Rewind, TrainingStopped, UserError):
        saver.finish()
        raise


def sample(
    engine: Engine, tokenizer: Tokenizer, config: Config, world: World,
    *, stop: Callable[[], bool] = lambda: False, mark: Callable[[str], None] = lambda _: None,
) -> list[tuple[str, str]]:  # fmt: skip
    """(prompt, continuation) for each prompt, as far as nobody asks to stop.

    Every rank samples the same text, as ZeRO-3's forward is collective.
    """
    banned = tokenizer.unused_ids(config.model.vocab_size)
    ends = loading.end_ids(tokenizer, companions.generation(config.run_folder / "tokenizer"))
    texts = []
    for prompt in config.sample.prompts:
        mark("sampling")
        if world.sum_ints(stop())[0]:
            break
        ids = tokenizer.encode(prompt) or [tokenizer.separator_id]
        with engine.evaluating():
            new = generate(
                engine.module, ids, config.generation, stop_ids=ends,
                banned_ids=banned, seed=config.run.seed,
            )  # fmt: skip
            texts.append((prompt, tokenizer.decode(list(new))))
    return texts


def _prepare(config: Config, begin: origin.Origin, rows_per_step: int, world: World, *, begins: bool) -> None:
    """Tokenise what is not yet; nothing is returned, for nothing but a word of success should travel to the ranks."""
    if begins and "SMOLTRAIN_SUPERVISOR" not in os.environ:  # which has looked already
        beforehand.of_start(config, world.device, world.size, rows_per_step)
    origin.inherit_data(config, begin)
    data.prepare(config, rows_per_step, world.size)


PACKING = {
    False: "documents are chopped into rows and see each other there; packing.document_mask=true keeps them apart",
    True: "documents are chopped into rows; attention and positions stay within each, as packing.document_mask asks",
}


def _rows(config: Config, rows_per_step: int, accumulation: int, world: World) -> str:
    split = f"{config.batch.rows_at_once} x {accumulation} accumulated x {world.size} ranks"
    return f"{rows_per_step} = {split} = {rows_per_step * config.batch.sequence_length:,} tokens"


def _device(world: World) -> str:
    match world.device.type:
        case "cuda":
            return f"{world.size} x {torch.cuda.get_device_name(world.device)}, NCCL"
        case "mps":
            return "1 rank on Apple's MPS, best effort: DeepSpeed there was never tried by us; engine.device=cpu is"
    found = "CUDA was not asked for" if torch.cuda.is_available() else "no CUDA device was found"
    hint = "; engine.device=mps would try this machine's GPU" if torch.backends.mps.is_available() else ""
    ranks = f"{world.size} CPU rank{'s' * (world.size > 1)}"
    each = f"{world.share.threads} thread{'s' * (world.share.threads > 1)} each, {world.share.how}"
    return f"{ranks}, {each}, gloo; {found}{hint}"


def _complete(plan: Plan, done: int) -> str:
    if done >= plan.last_step:
        return f"the plan is complete ({plan.last_step} steps)"
    return f"phase {plan.phase(done).name} is complete (step {done} of {plan.last_step})"
