"""The lines by which a start says what it does and why."""

import json
import os

import torch

from smoltrain.config.schema import EvaluateSection, OptimizerSection
from smoltrain.data.rows.loader import Loader
from smoltrain.data.tokens.prepared import PreparedData
from smoltrain.distributed.world import World
from smoltrain.engine.engine import Engine
from smoltrain.estimate.horizon import describe_plan
from smoltrain.evaluation.memorisation import find_reason_unknown
from smoltrain.kernels.compile import compiled_code_folder, is_known_to_compiler
from smoltrain.kernels.newton_schulz import choose_dtype
from smoltrain.run.run_folder import RunFolder
from smoltrain.run.track import Tracker
from smoltrain.training.preflight import PreflightLine, describe_preflight
from smoltrain.training.resolve_auto import ResolvedSettings
from smoltrain.training.start import Start

PACKING_IN_WORDS = {
    False: "documents are chopped into rows and see each other there; packing.document_mask=true keeps them apart",
    True: "documents are chopped into rows; attention and positions stay within each, as packing.document_mask asks",
}


def say_start(
    start: Start, settings: ResolvedSettings, folder: RunFolder, loader: Loader, engine: Engine, world: World,
    tracker: Tracker,
) -> None:  # fmt: skip
    """One line for each choice that was made, with its reason."""
    config = settings.config
    tracker.say_choice("run", str(folder.path))
    tracker.say_choice("device", describe_device(world))
    for what, reason in settings.reasons.items():
        tracker.say_choice(what, reason)
    if settings.computing.compiles:
        tracker.say_choice("compiled code", describe_compiled_code(name_compiled_code(settings, loader, world)))
    tracker.say_choice("gradients", engine.gradient_reduction_summary)
    tracker.say_choice("engine", f"DeepSpeed ZeRO-{engine.stage}, from {config.engine.ds_config}")
    tracker.say_choice("optimizer", describe_optimizer(engine.optimizer_summary, config.optimizer, world.device))
    waiting = describe_host_wait(engine.host_wait, world.device)
    if waiting:
        tracker.say_choice("update", waiting)
    tracker.say_choice("parameters", f"{settings.num_parameters:,}")
    tracker.say_choice("rows per step", _describe_rows_per_step(loader))
    tracker.say_choice("tokenizer", loader.prepared.describe_tokenizer())
    tracker.say_choice("data", loader.prepared.describe())
    few = describe_few_validation_rows(config.evaluate, loader.count_validation_rows(config.evaluate.rows))
    if few:
        tracker.say_choice("validation", few)
    warning = warn_of_unknown_memorisation(config.evaluate, loader.prepared)
    if warning:
        tracker.say(warning)
    tracker.say_choice("packing", PACKING_IN_WORDS[config.packing.document_mask])
    tracker.say_choice("plan", describe_plan(config, start.rows_per_step, loader.prepared.index))
    for line in find_preflight_lines(start, settings, folder, loader) if world.is_first else ():
        if line.warns:
            tracker.say(f"WARNING: {line.text}")
        else:
            tracker.say_choice(line.what, line.text)
    if os.environ.get("CUDA_LAUNCH_BLOCKING", "0") != "0":
        tracker.say("WARNING: CUDA_LAUNCH_BLOCKING is set: every kernel waits for the one before; unset it")
    if config.track.gradients_every and not engine.knows_master_weights:
        tracker.say_choice("weight norms", "not logged, DeepSpeed's config lays the weights out in a way unknown here")
    if folder.changes:
        tracker.say_choice("changed", "; ".join(folder.changes))
    if start.point.manifest:
        tracker.say(f"restored step {start.point.step} on {world.size} ranks, ledger {loader.ledger[:16]}")


def describe_few_validation_rows(section: EvaluateSection, num_rows: int) -> str | None:
    """How many rows are evaluated, where the held-out text has fewer than are asked for; None if it has enough."""
    if not section.every or num_rows >= section.rows:
        return None
    return f"{num_rows:,} rows, as no more are held out; evaluate.rows asks for {section.rows:,}"


def warn_of_unknown_memorisation(section: EvaluateSection, prepared: PreparedData) -> str | None:
    """One line if it is asked for what the model copies, and nobody can know."""
    reason = find_reason_unknown(prepared) if section.memorisation_every else None
    return f"WARNING: evaluate.memorisation_every measures nothing: {reason}" if reason else None


def describe_compiled_code(task: str) -> str:
    """Where compiled code is kept, and whether the first step has to wait for the compiler."""
    folder = compiled_code_folder()
    if is_known_to_compiler(task):
        return f"loaded from {folder}"
    return f"made before the first step, once, in about half a minute on a CPU; kept in {folder}"


def name_compiled_code(settings: ResolvedSettings, loader: Loader, world: World) -> str:
    """All that the code of a rank depends on: what differs in this is compiled anew."""
    config = settings.config
    computing = settings.computing
    kernels = [kernel.name for kernel in (computing.attention, computing.loss) if kernel is not None]
    facts = [
        config.model.model_dump(), config.optimizer.kind, settings.precision, kernels, computing.gradient_checkpointing,
        computing.z_loss, loader.layout.micro_batch, loader.layout.accumulation, loader.layout.sequence_length,
        config.packing.document_mask, world.size, world.device.type, world.cpu_share.threads, computing.compile_region,
        computing.cuda_graphs, computing.fused_projections,
    ]  # fmt: skip
    return json.dumps(facts)


def find_preflight_lines(
    start: Start, settings: ResolvedSettings, folder: RunFolder, loader: Loader
) -> list[PreflightLine]:
    """What the plan asks of data, model and ranks: once, where the run begins or its plan has changed."""
    begins = start.point.step == 0 or start.point.ancestor is not None
    if not begins and not any(change.startswith("phases.") for change in folder.changes):
        return []
    return describe_preflight(settings.config, loader.prepared, settings.num_parameters, start.rows_per_step)


def describe_device(world: World) -> str:
    """What the ranks compute on, and what else this machine could offer."""
    match world.device.type:
        case "cuda":
            return f"{world.size} x {torch.cuda.get_device_name(world.device)}, NCCL"
        case "mps":
            return "1 rank on Apple's MPS, best effort: DeepSpeed there was never tried by us; engine.device=cpu is"
    share = world.cpu_share
    ranks = f"{world.size} CPU rank{'s' * (world.size > 1)}"
    threads = f"{share.threads} thread{'s' * (share.threads > 1)} each, {share.how}"
    gpu = "CUDA was not asked for" if torch.cuda.is_available() else "no CUDA device was found"
    hint = "; engine.device=mps would try this machine's GPU" if torch.backends.mps.is_available() else ""
    return f"{ranks}, {threads}, gloo; {gpu}{hint}"


def describe_optimizer(summary: str, section: OptimizerSection, device: torch.device) -> str:
    """What updates which parameters (`summary`), and how muon computes its part on this device."""
    if section.kind != "muon":
        return summary
    _, dtype_and_reason = choose_dtype(device)
    facts = [summary, f"{section.newton_schulz_steps} Newton-Schulz iterations in {dtype_and_reason}"]
    if section.embedding_lr_factor != 1:
        facts.append(f"embeddings and head at {section.embedding_lr_factor:g} x lr")
    return "; ".join(facts)


def describe_host_wait(reason: str | None, device: torch.device) -> str | None:
    """That the host waits in each step, if it does: a CPU is its own host."""
    if reason is None or device.type == "cpu":
        return None
    return f"the host waits for the GPU before each update: {reason}"


def _describe_rows_per_step(loader: Loader) -> str:
    layout = loader.layout
    split = f"{layout.micro_batch} x {layout.accumulation} accumulated x {layout.world_size} ranks"
    return f"{layout.rows_per_step} = {split} = {layout.rows_per_step * layout.sequence_length:,} tokens"
