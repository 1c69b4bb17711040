"""Whether a checkpoint is what its run says: files, shapes, finite numbers, its place in the data, and its loss.

Nothing is written, and the run may be under way.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smoltrain import (
    checkpoint,
    config,
    data,
    dist,
    files,
    huggingface,
    ledger,
    loading,
    model,
    reshape,
    runfolder,
    spikes,
)
from smoltrain.checkpoint import MODEL_STATES, RANDOM, SHARD, Manifest
from smoltrain.data import Loader, bad_records
from smoltrain.data.packing import NO_LABEL
from smoltrain.ds_config import DTYPES
from smoltrain.errors import Problem, TrainingStopped, UserError
from smoltrain.ledger import History
from smoltrain.model import LanguageModel
from smoltrain.plan import Plan
from smoltrain.schema import Config
from smoltrain.wandb_id import UNDONE

# How far a loss that is computed again may be off, as a share of it. Other kernels and other batches add the same
# numbers up in another order: measured 6e-6 in bf16 and 4e-8 in fp32. A bf16 model computed in fp32 was 4e-5 off.
TOLERANCES = {"bf16": 5e-4, "fp16": 1e-4, "fp32": 1e-6}

Look = tuple[str, list[str]]  # what was looked at, in words; what is wrong with it


@dataclass(frozen=True)
class Run:
    """What the checkpoints of a run folder must agree with."""

    folder: Path
    config: Config
    rows_per_step: int
    wandb_id: str
    skeleton: LanguageModel  # of the config, without numbers
    history: History | None  # of its rows; None without a ledger
    loader: Loader | None  # on one rank
    no_loader: str = ""  # why there is none


def verify(source: str, other: str | None = None, *, forward: bool = False) -> bool:
    """Whether nothing is wrong with a run, or with one checkpoint of it; prints what was looked at.

    With `other`: whether two runs trained on the same rows. `forward` also computes the validation loss again.
    Errors: UserError for what is no run or checkpoint, a run without a row, and data that `forward` lacks.
    """
    if other is not None:
        if forward:
            what, want = "two runs are compared by their rows alone", "one run or checkpoint"
            raise UserError(Problem(what, "--forward with OTHER", want, "--forward or OTHER"))
        return ledger.verify([loading.run_folder(name) for name in (source, other)])
    folder, step = loading.locate(source)
    fine, steps = True, checkpoint.steps(folder / "checkpoints")
    if step is not None:
        loading.checkpoint_folder(folder, step, "the RUN argument")
        steps = [step]
    else:
        try:
            fine = ledger.verify([folder])
        except UserError as error:
            if not steps:
                raise
            print(error)
            fine = False
        for fault in filter(None, (*_records(folder), runfolder.damage(folder), _gone(folder, steps))):
            print(fault)
            fine = False
    run = _open(folder, forward) if steps else None
    for each in steps:
        assert run is not None
        at = checkpoint.folder_of(folder / "checkpoints", each)
        looked_at, faults = inspect(run, at, forward=forward)
        if at.is_dir():  # a run under way deletes old ones
            print(f"{at}: {looked_at}", *(f"{at} is not as it should be: {fault}" for fault in faults), sep="\n")
            fine = fine and not faults
    return fine if step is not None else _tokens(folder) and fine


def _config(folder: Path) -> Config:
    """A run's own, wherever its folder lies now. Errors: UserError for one that this version cannot read."""
    settings = config.read(folder / "config.yaml")
    here = settings.run.model_copy(update={"folder": folder.parent, "name": folder.name})
    return settings.model_copy(update={"run": here})


def _tokens(folder: Path) -> bool:
    """Whether a run's tokens and tokenizer are what was written; prints what was looked at."""
    try:
        looked_at, faults = data.inspect(_config(folder))
    except UserError as error:  # they are away, or in a cache that is
        print(f"{folder / 'data'}: not looked into ({error.problems[0]})")
        return not (folder / "data" / "index.json").exists()
    wrong = [f"{folder / 'data'} is not as it should be: {fault}" for fault in faults]
    print(*(wrong or [f"{folder / 'data'}: {looked_at}"]), sep="\n")
    return not faults


def _records(folder: Path) -> list[str]:
    """Where the run's records are damaged, but for metrics.jsonl, which the ledger is compared with."""
    found = []
    steps, source = ("step",), ("source",)
    named = {UNDONE: steps, "samples.jsonl": steps, spikes.FILE: steps, f"data/{bad_records.FILE}": source}
    for name, keys in named.items():
        if damaged := [line for line in files.lines(folder / name, keys) if line.fault]:
            found.append(files.damage(folder / name, damaged))
    return found


def _gone(folder: Path, steps: list[int]) -> str:
    """Whether the run has saved checkpoints of which none is left."""
    saved = checkpoint.last_saved(folder)
    return f"{folder / 'checkpoints'} is empty, but the run has saved step {saved}" if saved and not steps else ""


def _open(folder: Path, needs_data: bool) -> Run:
    """Errors: UserError for a config that this version cannot read, and for data that are needed and not there."""
    settings, provenance = _config(folder), runfolder.provenance_of(folder / "config.yaml")
    rows = provenance["rows_per_step"]
    history, loader, no_loader = None, None, ""
    try:
        accumulation = runfolder.accumulation(settings, rows, 1)
        loader = data.open(settings, 0, 1, rows_per_step=rows, accumulation=accumulation)
    except UserError as error:
        if needs_data:
            raise
        no_loader = str(error.problems[0])
    with contextlib.suppress(UserError):  # without rows; `verify` says so
        history = ledger.read(folder)
    skeleton = model.build(settings.model, device="meta")
    return Run(folder, settings, rows, provenance["wandb_id"], skeleton, history, loader, no_loader)


def inspect(run: Run, folder: Path, *, forward: bool = False) -> Look:
    """One checkpoint of a run. Where a file is not what was written, the others are not looked into."""
    manifest = checkpoint.verify(folder)
    if isinstance(manifest, str):
        return "not looked into", [manifest]
    size = sum(record["bytes"] for record in manifest.files.values())
    looks = [
        (f"{len(manifest.files)} files ({size / 2**20:,.1f} MiB) are as they were written", []),
        _facts(run, manifest),
        _weights(run, folder, manifest),
        _states(run, folder, manifest),
        _rows(run, manifest),
    ]
    if forward and not any(faults for _, faults in looks):
        looks.append(_loss(run, folder, manifest))
    fine = [words for words, faults in looks if words and not faults]
    return ", ".join(fine), [fault for _, faults in looks for fault in faults]


def _facts(run: Run, manifest: Manifest) -> Look:
    """What the manifest says of itself, beside what the run says."""
    plan = Plan(run.config.phases)
    phase = plan.phase(manifest.step).name if 1 <= manifest.step <= plan.last_step else "none"
    pairs = (("phase", manifest.phase, phase), ("W&B id", manifest.wandb_id, run.wandb_id))
    faults = [f"its {what} is {saw!r}, in the run's config.yaml {want!r}" for what, saw, want in pairs if saw != want]
    try:
        runfolder.check_checkpoint(manifest, run.folder / runfolder.CONFIG)
    except UserError as error:
        faults += [f"{problem.what}: {problem.saw}" for problem in error.problems]
    return "", faults


def _weights(run: Run, folder: Path, manifest: Manifest) -> Look:
    """model.safetensors: the config's shapes and finite numbers, as read_weights has it, and the precision's dtype."""
    try:
        weights = loading.read_weights(folder, run.skeleton)
    except UserError as error:
        return "", [str(problem) for problem in error.problems]
    faults = []
    if (stored := huggingface.stored_dtype(weights.values())) != DTYPES[manifest.precision]:
        faults.append(f"model.safetensors is in {stored}, but the checkpoint in {manifest.precision}")
    return f"{len(weights)} tensors fit the config", faults


def _states(run: Run, folder: Path, manifest: Manifest) -> Look:
    """What only training reads: modules, masters, moments and random states, file by file."""
    names, world, stage = sorted(manifest.files), manifest.world_size, manifest.zero_stage
    shards = {name: int(found[1]) for name in names if (found := SHARD.search(name))}
    modules = [name for name in names if name.endswith(MODEL_STATES)]
    draws = [name for name in names if RANDOM.match(name)]
    faults = checkpoint.lacking(manifest)
    faults += checkpoint.strays(folder, manifest)
    shapes: Any = None  # DeepSpeed's, of the flat tensors in the shards
    for name in [*modules, *shards, *draws]:
        try:
            tree = _read(folder / name)
            if name in modules:
                found = _module(run.skeleton, tree, stage)
                shapes = None if found else tree["param_shapes"]
            elif name in shards:
                found = _shard(tree["optimizer_state_dict"], shapes, stage, world, shards[name])
            else:
                found = _not_finite(tree)
            faults += [f"{name}: {fault}" for fault in found]
        except TrainingStopped as error:
            faults.append(str(error))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            faults.append(f"{name} is not laid out as DeepSpeed does it ({type(error).__name__}: {error})")
    count = sum(p.numel() for p in run.skeleton.parameters())
    ranks = f"{world} ranks" if world > 1 else "one rank"
    return f"masters and moments of {count:,} parameters by {ranks} are finite", faults


def _module(skeleton: LanguageModel, tree: dict[str, Any], stage: int) -> list[str]:
    """What is wrong with the weights that DeepSpeed loads, and what it says of the optimizer states.

    Under ZeRO-0 these are here too, and masters are the weights themselves.
    """
    faults = _not_finite(tree)
    if stage < 3:  # ZeRO-3 puts empty tensors here
        faults += _differing(
            {name: tuple(x.shape) for name, x in tree["module"].items()},
            {name: tuple(x.shape) for name, x in skeleton.state_dict().items()},
        )
    trainable = {name: tuple(p.shape) for name, p in skeleton.named_parameters() if p.requires_grad}
    if stage > 0:
        flat = {name: tuple(shape) for group in tree["param_shapes"] for name, shape in group.items()}
        return faults + [f"of the optimizer states, {fault}" for fault in _differing(flat, trainable)]
    want = sum(map(math.prod, trainable.values()))
    for moment in ("exp_avg", "exp_avg_sq"):
        have = sum(x.numel() for key, x in _tensors(tree["optimizer"]) if key.endswith(f".{moment}"))
        if have != want:
            faults.append(f"{moment} has {have:,} elements, not {want:,}")
    return faults


def _shard(state: dict[str, Any], shapes: Any, stage: int, world: int, rank: int) -> list[str]:
    """What is wrong with one rank's masters and moments. Padding may hold anything.

    `shapes` are DeepSpeed's, of the parameters in each flat tensor; None if they are wrong themselves.
    """
    if shapes is None:
        return []
    wrote = reshape.layout(stage, shapes, state.get(reshape.GAPS), world)
    masters, adamw = (next((key for key in keys if key in state), keys[0]) for keys in (reshape.MASTERS, reshape.ADAMW))
    bad: dict[str, None] = {}  # in order
    for stretch in wrote.stretches(rank):
        stop = stretch.place + stretch.stop - stretch.first
        moments = state[adamw]["state"].get(stretch.tensor, {})
        for what, flat in {"masters": state[masters][stretch.tensor], **moments}.items():
            if flat.dim() and len(flat) < stop:
                bad[f"{what} has {len(flat):,} elements, which end within {stretch.name}"] = None
            elif not _finite(flat[stretch.place : stop] if flat.dim() else flat):
                bad[f"{what} of {stretch.name} is not finite"] = None
    return list(bad)


def _rows(run: Run, manifest: Manifest) -> Look:
    """Its place in the data, beside the run's ledger, metrics and tokens."""
    state, step, history, faults = manifest.loader, manifest.step, run.history, []
    position = state.get("position", -1)
    if position < step * run.rows_per_step or position % run.rows_per_step:
        faults.append(f"it has used {position:,} rows, but {step} steps take {run.rows_per_step} each")
    elif history is not None and history.chain_after(position) != state.get("ledger"):
        faults.append(f"its first {position:,} rows are not those of {run.folder / ledger.FILE}")
    if history is not None and not _told(history, step, 0) <= position < _told(history, step + 1, position + 1):
        faults.append(f"it has used {position:,} rows, but metrics.jsonl has others for steps {step} and {step + 1}")
    try:
        if run.loader is not None:
            run.loader.load_state(state)
    except UserError as error:
        faults += [str(problem) for problem in error.problems]
    except (LookupError, TypeError, ValueError) as error:
        faults.append(f"its place in the data cannot be read ({type(error).__name__}: {error})")
    beside = "" if history is None else f" as in {ledger.FILE}"
    but = f" (not compared with the data: {run.no_loader})" if run.loader is None else ""
    return f"{position:,} rows{beside}{but}", faults


def _told(history: History, step: int, unknown: int) -> int:
    """The rows consumed after a step, as metrics.jsonl has it. Those spent after it belong to the step behind it."""
    found = history.rows[history.steps == step]
    return int(found[-1]) if len(found) else unknown


def _loss(run: Run, folder: Path, manifest: Manifest) -> Look:
    """The validation loss of the checkpoint, computed now, beside the one that was stored."""
    assert run.loader is not None, "`verify` has asked for the data"
    num_rows = manifest.validation_rows or run.config.evaluate.rows
    device = dist.choose_device("auto")
    loss = validation_loss(loading.load_run(str(folder)), run.loader.validation(num_rows), device)
    now = f"validation loss {loss:.5f} nats per token on {num_rows} rows"
    if manifest.validation_loss is None:
        return f"{now} (none was stored to compare with)", []
    share = TOLERANCES[manifest.precision]
    tolerance = share * manifest.validation_loss
    reason = f"in {manifest.precision} the order of additions moves a loss by less than {share:g} of itself"
    words = f"{now}, {manifest.validation_loss:.5f} when it was saved (tolerance {tolerance:.1g}: {reason})"
    return (words, []) if abs(loss - manifest.validation_loss) <= tolerance else ("", [words])


@torch.no_grad()
def validation_loss(loaded: loading.LoadedRun, batches: list[data.Batch], device: torch.device) -> float:
    """Mean loss of the rows, nats per token, in the precision of the checkpoint as far as the device computes in it."""
    dtype = torch.float32 if (loaded.dtype, device.type) == (torch.float16, "cpu") else loaded.dtype
    for parameter in loaded.model.to(device).parameters():
        parameter.data = parameter.data.to(dtype)  # buffers stay in fp32, as DeepSpeed leaves them
    total, num_tokens = 0.0, 0
    for batch in batches:
        there = batch.to(device)
        total += float(loaded.model(there.ids_BT, there.labels_BT, positions_BT=there.positions_BT))
        num_tokens += int((batch.labels_BT != NO_LABEL).sum())
    return total / num_tokens


def _read(path: Path) -> Any:
    """One of training's own files. Errors: TrainingStopped, as files.read_tensors."""
    from smoltrain.engine import ALLOWED  # which loads DeepSpeed: seconds that a look at a ledger need not take

    return files.read_tensors(path, ALLOWED)


def _tensors(tree: Any, key: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """(dotted key, tensor) of all tensors in nested containers."""
    if isinstance(tree, torch.Tensor):
        yield key.lstrip("."), tree
    elif isinstance(tree, dict | list | tuple):
        for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _tensors(value, f"{key}.{name}")


def _not_finite(tree: Any) -> list[str]:
    return [f"{key} is not finite" for key, x in _tensors(tree) if not _finite(x)]


def _finite(x: torch.Tensor) -> bool:
    return bool(torch.isfinite(x).all())


def _differing(have: dict[str, Any], want: dict[str, Any]) -> list[str]:
    """At most three of the parameters whose sizes or shapes are not the config's."""
    names = [name for name in [*want, *(have.keys() - want.keys())] if have.get(name) != want.get(name)]
    return [f"{name} is {have.get(name, 'missing')}, in the config {want.get(name, 'unknown')}" for name in names[:3]]
