"""run(config): the whole of training, in order. The table of contents of the project.

config -> world -> data -> run folder -> model -> engine -> restore -> [step, and what is due after it] -> done
"""

import math
import os
import resource
import time
from dataclasses import dataclass

import torch

from smoltrain import checkpoint, data, dist, ds_config, engine, gradients, model, origin, plots, runfolder, track
from smoltrain.data import Batch, Loader
from smoltrain.data.tokenizer import Tokenizer
from smoltrain.dist import StopFlag, World
from smoltrain.engine import Engine
from smoltrain.errors import DONE, STOPPED, TrainingStopped
from smoltrain.generate import generate
from smoltrain.model import attention
from smoltrain.plan import Plan
from smoltrain.schema import Config

MAX_SKIPS_IN_A_ROW = 50  # fp16's loss scale halves from 2^16 to 1 in 16 of them


def run(config: Config) -> int:
    """Train until the plan, run.stop_after or a signal ends it; returns the exit code (errors.py). Collective.

    Errors: UserError and TrainingStopped, on every rank alike.
    """
    stop = StopFlag()
    world = dist.open(config.engine.device)
    plan = Plan(config.phases)
    last_step = plan.named(config.run.stop_after).last if config.run.stop_after else plan.last_step

    # ---- what is on disk: where to begin, the run's identity, data
    notes: list[str] = []
    begin = world.on_first(lambda: origin.find(config, notes.append))
    done, manifest = begin.step, begin.manifest
    rows_per_step = world.on_first(lambda: runfolder.check(config, world.size, done, begin.ancestor))["rows_per_step"]
    world.on_first(lambda: _prepare(config, begin, rows_per_step))
    if done >= last_step:
        if world.is_first:
            print(f"{config.run.name}: {_complete(plan, done)}")
        return DONE
    if manifest:
        checkpoint.check_world(manifest, world.size)
    folder = world.on_first(lambda: runfolder.enter(config, world.size, done, begin.ancestor))
    accumulation = runfolder.accumulation(config, folder.rows_per_step, world.size)

    with track.open(config, folder, world.rank, done, last_step) as tracker:
        for note in notes:
            tracker.say(note)

        # ---- what trains: rows, model, engine
        loader = data.open(
            config, world.rank, world.size, rows_per_step=folder.rows_per_step, accumulation=accumulation
        )
        precision, why = ds_config.choose_precision(config.engine.precision, world.device)
        dtype, dropout = getattr(torch, DTYPES[precision]), model.attention_dropout(config.model)
        kernel = attention.choose(config.engine.attention, world.device, dtype, dropout=dropout)
        torch.manual_seed(config.run.seed)  # the same weights on every rank
        decoder = model.build(
            config.model, gradient_checkpointing=config.engine.gradient_checkpointing, attention=kernel
        )
        num_parameters = model.parameter_count(decoder)
        if begin.weights_from:
            origin.load_weights(begin, config, decoder, loader.prepared.tokenizer)
        torch.manual_seed(config.run.seed + 1 + world.rank)  # other dropout on each
        wrapped = engine.wrap(decoder, config, world, precision=precision, accumulation=accumulation)
        for what, value in (
            ("run", folder.path),
            ("device", _device(world)),
            ("precision", f"{precision}, {why}; {wrapped.dtypes}"),
            ("attention kernel", f"{kernel.name}, {kernel.reason}"),
            ("gradient checkpointing", f"{config.engine.gradient_checkpointing}, as the recipe asks"),
            ("engine", f"DeepSpeed ZeRO-{wrapped.stage}, from {config.engine.ds_config}"),
            ("parameters", f"{num_parameters:,}"),
            ("rows per step", _rows(config, folder.rows_per_step, accumulation, world)),
            ("tokenizer", loader.prepared.describe_tokenizer()),
            ("data", loader.prepared.describe()),
            ("plan", ", ".join(f"{p.name} {p.first}-{p.last}" for p in plan.phases)),
        ):
            tracker.chosen(what, str(value))
        if os.environ.get("CUDA_LAUNCH_BLOCKING", "0") != "0":
            tracker.say("WARNING: CUDA_LAUNCH_BLOCKING is set: every kernel waits for the one before; unset it")

        # ---- where it left off
        checkpoints = folder.path / "checkpoints"
        if manifest and begin.checkpoint:
            checkpoint.restore(begin.checkpoint, manifest, wrapped, loader, world)
            tracker.say(f"restored step {done} on {world.size} ranks, ledger {loader.ledger[:16]}")
        skipped = manifest.skipped_updates if manifest else 0
        facts = {"precision": precision, "wandb_id": folder.wandb_id}

        # ---- the loop
        for step in range(done + 1, last_step + 1):
            result = train_step(step, wrapped, loader, plan, world, config.track.gradients_every)
            skipped += result.num_skipped
            tracker.step(step, last_step, plan.phase(step).name, result.metrics | {"train/skipped_updates": skipped})
            if result.layers:
                tracker.gradients(step, result.layers)

            if plan.due(step, config.evaluate.every):
                loss = evaluate(wrapped, loader.validation(config.evaluate.rows), world)
                perplexity = math.exp(loss) if loss < 700 else math.inf
                tracker.metrics(step, {"validation/loss_nats_per_token": loss, "validation/perplexity": perplexity})
                tracker.say(f"validation at step {step}: loss {loss:.4f}, perplexity {perplexity:,.1f}")
            if plan.due(step, config.sample.every):
                tracker.samples(step, sample(wrapped, loader.prepared.tokenizer, config))

            stopping = world.sum_ints(stop.is_raised())[0] > 0
            if plan.due(step, config.checkpoint.every) or plan.ends_phase(step) or stopping:
                began = time.perf_counter()
                path = checkpoint.save(
                    checkpoints, step, wrapped, loader, world, plan,
                    config.checkpoint.keep_last, skipped_updates=skipped, **facts,
                )  # fmt: skip
                tracker.say(f"checkpoint {path} in {time.perf_counter() - began:.1f} s")
                tracker.model(step, path / "model.safetensors", ends_phase=plan.ends_phase(step))
            if stopping and step < last_step:
                reason = next(r for r in world.gather(stop.reason) if r)
                tracker.say(f"stopped after step {step} ({reason}); the same command goes on from there")
                return STOPPED

        if world.is_first:
            plots.run_pngs(plan, folder.path)
        tracker.say(f"{config.run.name}: {_complete(plan, last_step)}; the curves are in {folder.path / 'plots'}")
        return DONE


@dataclass(frozen=True)
class StepResult:
    """What one training step measured, the same on every rank."""

    metrics: dict[str, float | str]
    layers: dict[str, gradients.LayerGradient]
    num_skipped: int


def train_step(step: int, engine: Engine, loader: Loader, plan: Plan, world: World, gradients_every: int) -> StepResult:
    """The step-th update: rows in, gradients of the global mean loss, one AdamW step. Collective.

    A step whose gradient is not finite is no step: its rows are spent, the skip is counted, the next rows are tried.
    Errors: TrainingStopped before the update when the loss is not finite.
    """
    if plan.resets_optimizer(step):
        engine.reset_optimizer()
    lr, weight_decay = plan.lr(step), plan.weight_decay(step)
    num_skipped = 0
    while True:
        began = time.perf_counter()
        rows = loader.take()
        waited = time.perf_counter() - began
        num_tokens, digest = world.sum_ints(rows.num_tokens, rows.digest)

        losses = []
        for batch in rows.micro_batches:
            loss = engine.forward(batch)  # sum over this micro-batch's tokens
            losses.append(loss.detach().double())
            engine.backward(loss * (world.size / num_tokens))  # DeepSpeed's mean over ranks makes it the global mean

        local = float(torch.stack(losses).sum())  # the step's one wait for the device before the update
        mean_loss = world.sum_floats(local)[0] / num_tokens
        if not math.isfinite(mean_loss):
            _stop_on(step, world.gather(local), lr, engine)
        inspecting = time.perf_counter()
        layers = gradients.by_layer(engine.gradients()) if plan.due(step, gradients_every) else {}
        inspected = time.perf_counter() - inspecting
        applied = engine.update(lr=lr, weight_decay=weight_decay)
        loader.consumed(digest)
        if applied:
            break
        num_skipped += 1
        if num_skipped == MAX_SKIPS_IN_A_ROW:
            raise TrainingStopped(
                f"step {step}: {MAX_SKIPS_IN_A_ROW} updates in a row had a gradient that is not finite (lr {lr:g}); "
                "the last checkpoint is intact; try a lower lr, a longer warm-up, or precision bf16"
            )

    own = time.perf_counter() - began - inspected
    step_s, wait_share, peak = world.max_floats(own, waited / own, _peak_gib(world))
    return StepResult(
        {
            "train/loss_nats_per_token": mean_loss,
            "train/lr": lr,
            "train/weight_decay": weight_decay,
            "train/grad_norm_before_clipping": engine.grad_norm_before_clipping,
            "train/loss_scale": engine.loss_scale,
            "data/tokens": loader.tokens_consumed,
            "data/epochs": loader.epoch,
            "data/unique_rows": loader.unique_rows,
            "data/ledger": loader.ledger,
            "speed/tokens_per_s": num_tokens / step_s,
            "speed/step_s": step_s,
            "speed/steps_per_s": 1 / step_s,
            "speed/data_wait_share": wait_share,
            "memory/peak_gib": peak,
        },
        layers,
        num_skipped,
    )


def evaluate(engine: Engine, batches: list[Batch], world: World) -> float:
    """Mean loss over the validation rows of all ranks, nats per token. Collective."""
    with engine.evaluating():
        loss = sum(float(engine.forward(batch)) for batch in batches)
    num_tokens = sum(int((batch.labels_BT != -100).sum()) for batch in batches)
    loss, num_tokens = world.sum_floats(loss, num_tokens)
    return loss / num_tokens


def sample(engine: Engine, tokenizer: Tokenizer, config: Config) -> list[tuple[str, str]]:
    """(prompt, continuation) for each prompt. Every rank samples the same text, as ZeRO-3's forward is collective."""
    banned = tokenizer.unspoken_ids(config.model.vocab_size)
    texts = []
    for prompt in config.sample.prompts:
        ids = tokenizer.encode(prompt) or [tokenizer.separator_id]
        with engine.evaluating():
            new = generate(
                engine.module, ids, config.generation, stop_id=tokenizer.separator_id,
                banned_ids=banned, seed=config.run.seed,
            )  # fmt: skip
            texts.append((prompt, tokenizer.decode(list(new))))
    return texts


def _prepare(config: Config, begin: origin.Origin, rows_per_step: int) -> None:
    """Tokenise what is not yet; nothing is returned, for nothing but a word of success should travel to the ranks."""
    origin.inherit_data(config, begin)
    data.prepare(config, rows_per_step)


DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def _stop_on(step: int, losses: list[float], lr: float, engine: Engine) -> None:
    """Name the ranks and the numbers of a loss that is not finite."""
    ranks = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
    norm = math.sqrt(sum(float(g.double().square().sum()) for _, g in engine.gradients()))
    raise TrainingStopped(
        f"the loss of step {step} is {losses[ranks[0]]} on rank {', '.join(map(str, ranks))} "
        f"(lr {lr:g}, gradient norm {norm:g}); nothing was updated and the last checkpoint is intact; "
        "try a lower lr, a longer warm-up, gradient_clipping 1.0, or look at the data of this step"
    )


def _rows(config: Config, rows_per_step: int, accumulation: int, world: World) -> str:
    split = f"{config.batch.micro_batch} x {accumulation} accumulated x {world.size} ranks"
    return f"{rows_per_step} = {split} = {rows_per_step * config.batch.sequence_length:,} tokens"


def _device(world: World) -> str:
    match world.device.type:
        case "cuda":
            return f"{world.size} x {torch.cuda.get_device_name(world.device)}, NCCL"
        case "mps":
            return "1 rank on Apple's MPS, best effort: DeepSpeed there was never tried by us; engine.device=cpu is"
    found = "CUDA was not asked for" if torch.cuda.is_available() else "no CUDA device was found"
    hint = "; engine.device=mps would try this machine's GPU" if torch.backends.mps.is_available() else ""
    return f"{world.size} CPU ranks, {torch.get_num_threads()} threads each, gloo; {found}{hint}"


def _peak_gib(world: World) -> float:
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 2**30
    if world.device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def _complete(plan: Plan, done: int) -> str:
    if done >= plan.last_step:
        return f"the plan is complete ({plan.last_step} steps)"
    return f"phase {plan.phase(done).name} is complete (step {done} of {plan.last_step})"
