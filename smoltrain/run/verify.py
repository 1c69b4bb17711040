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

from smoltrain import files
from smoltrain.checkpoint import identity
from smoltrain.checkpoint.manifest import (
    MODEL_STATES_SUFFIX,
    RNG_STATE_NAME,
    SHARD_NAME,
    Manifest,
    list_checkpoint_steps,
    list_missing_states,
    list_stray_files,
    read_last_saved_step,
    step_folder,
    verify_checkpoint,
)
from smoltrain.config.config_file import CONFIG_FILE, find_config_damage, read_provenance
from smoltrain.config.load import read_run_config
from smoltrain.config.schema import Config
from smoltrain.data.documents.bad_records import BAD_RECORDS_FILE
from smoltrain.data.rows.loader import Batch, Loader
from smoltrain.data.rows.open_loader import open_loader
from smoltrain.data.tokens.prepare import inspect_prepared_data
from smoltrain.distributed.world import choose_device
from smoltrain.engine.reshard import ADAMW_KEYS, GAPS_KEY, MASTER_KEYS, build_shard_layout
from smoltrain.errors import Problem, TrainingStopped, UserError
from smoltrain.inference import load
from smoltrain.inference.load import (
    LoadedModel,
    find_checkpoint_folder,
    find_run_folder,
    locate_run,
    read_checkpoint_weights,
)
from smoltrain.kernels.loss import IGNORE_INDEX
from smoltrain.kernels.precision import DTYPES
from smoltrain.model.build import build_model
from smoltrain.model.hf_format import common_dtype
from smoltrain.model.interface import LanguageModel
from smoltrain.run.row_ledger import LEDGER_FILE, RowHistory, read_row_history, verify_ledgers
from smoltrain.run.run_folder import SPIKES_FILE, accumulation_steps
from smoltrain.run.wandb_id import UNDONE_METRICS_FILE
from smoltrain.schedule import Plan

# How far a loss that is computed again may be off, as a share of it. Other kernels and other batches add the same
# numbers up in another order: measured 6e-6 in bf16 and 4e-8 in fp32. A bf16 model computed in fp32 was 4e-5 off.
LOSS_TOLERANCES = {"bf16": 5e-4, "fp16": 1e-4, "fp32": 1e-6}

CheckResult = tuple[str, list[str]]  # what was looked at, in words; what is wrong with it


@dataclass(frozen=True)
class RunReference:
    """What the checkpoints of a run folder must agree with."""

    folder: Path
    config: Config
    rows_per_step: int
    wandb_id: str
    meta_model: LanguageModel  # of the config, without numbers
    history: RowHistory | None  # of its rows; None without a ledger
    loader: Loader | None  # on one rank
    no_loader_reason: str = ""  # why there is none


def verify_run(source: str, other: str | None = None, *, forward: bool = False) -> bool:
    """Whether nothing is wrong with a run, or with one checkpoint of it; prints what was looked at.

    With `other`: whether two runs trained on the same rows. `forward` also computes the validation loss again.
    Errors: UserError for what is no run or checkpoint, a run without a row, and data that `forward` lacks.
    """
    if other is not None:
        if forward:
            what, want = "two runs are compared by their rows alone", "one run or checkpoint"
            raise UserError(Problem(what, "--forward with OTHER", want, "--forward or OTHER"))
        return verify_ledgers([find_run_folder(name) for name in (source, other)])
    folder, step = locate_run(source)
    fine, steps = True, list_checkpoint_steps(folder / "checkpoints")
    if step is not None:
        find_checkpoint_folder(folder, step, "the RUN argument")
        steps = [step]
    else:
        try:
            fine = verify_ledgers([folder])
        except UserError as error:
            if not steps:
                raise
            print(error)
            fine = False
        for fault in filter(
            None, (*_find_damaged_records(folder), find_config_damage(folder), _find_lost_checkpoints(folder, steps))
        ):
            print(fault)
            fine = False
    run = _open_run_reference(folder, forward) if steps else None
    for each in steps:
        assert run is not None
        at = step_folder(folder / "checkpoints", each)
        looked_at, faults = inspect_checkpoint(run, at, forward=forward)
        if at.is_dir():  # a run under way deletes old ones
            print(f"{at}: {looked_at}", *(f"{at} is not as it should be: {fault}" for fault in faults), sep="\n")
            fine = fine and not faults
    return fine if step is not None else _verify_tokens(folder) and fine


def _read_relocated_config(folder: Path) -> Config:
    """A run's own, wherever its folder lies now. Errors: UserError for one that this version cannot read."""
    settings = read_run_config(folder / "config.yaml")
    here = settings.run.model_copy(update={"folder": folder.parent, "name": folder.name})
    return settings.model_copy(update={"run": here})


def _verify_tokens(folder: Path) -> bool:
    """Whether a run's tokens and tokenizer are what was written; prints what was looked at."""
    try:
        looked_at, faults = inspect_prepared_data(_read_relocated_config(folder))
    except UserError as error:  # they are away, or in a cache that is
        print(f"{folder / 'data'}: not looked into ({error.problems[0]})")
        return not (folder / "data" / "index.json").exists()
    wrong = [f"{folder / 'data'} is not as it should be: {fault}" for fault in faults]
    print(*(wrong or [f"{folder / 'data'}: {looked_at}"]), sep="\n")
    return not faults


def _find_damaged_records(folder: Path) -> list[str]:
    """Where the run's records are damaged, but for metrics.jsonl, which the ledger is compared with."""
    found = []
    steps, source = ("step",), ("source",)
    named = {UNDONE_METRICS_FILE: steps, "samples.jsonl": steps, SPIKES_FILE: steps, f"data/{BAD_RECORDS_FILE}": source}
    for name, keys in named.items():
        if damaged := [line for line in files.read_jsonl_lines(folder / name, keys) if line.fault]:
            found.append(files.describe_damaged_lines(folder / name, damaged))
    return found


def _find_lost_checkpoints(folder: Path, steps: list[int]) -> str:
    """Whether the run has saved checkpoints of which none is left."""
    saved = read_last_saved_step(folder)
    return f"{folder / 'checkpoints'} is empty, but the run has saved step {saved}" if saved and not steps else ""


def _open_run_reference(folder: Path, needs_data: bool) -> RunReference:
    """Errors: UserError for a config that this version cannot read, and for data that are needed and not there."""
    settings, provenance = _read_relocated_config(folder), read_provenance(folder / "config.yaml")
    rows = provenance["rows_per_step"]
    history, loader, no_loader = None, None, ""
    try:
        accumulation = accumulation_steps(settings, rows, 1)
        loader = open_loader(settings, 0, 1, rows_per_step=rows, accumulation=accumulation)
    except UserError as error:
        if needs_data:
            raise
        no_loader = str(error.problems[0])
    with contextlib.suppress(UserError):  # without rows; `verify` says so
        history = read_row_history(folder)
    skeleton = build_model(settings.model, device="meta")
    return RunReference(folder, settings, rows, provenance["wandb_id"], skeleton, history, loader, no_loader)


def inspect_checkpoint(run: RunReference, folder: Path, *, forward: bool = False) -> CheckResult:
    """One checkpoint of a run. Where a file is not what was written, the others are not looked into."""
    manifest = verify_checkpoint(folder)
    if isinstance(manifest, str):
        return "not looked into", [manifest]
    size = sum(record["bytes"] for record in manifest.files.values())
    looks = [
        (f"{len(manifest.files)} files ({size / 2**20:,.1f} MiB) are as they were written", []),
        _check_manifest(run, manifest),
        _check_weights(run, folder, manifest),
        _check_training_states(run, folder, manifest),
        _check_data_position(run, manifest),
    ]
    if forward and not any(faults for _, faults in looks):
        looks.append(_check_validation_loss(run, folder, manifest))
    fine = [words for words, faults in looks if words and not faults]
    return ", ".join(fine), [fault for _, faults in looks for fault in faults]


def _check_manifest(run: RunReference, manifest: Manifest) -> CheckResult:
    """What the manifest says of itself, beside what the run says."""
    plan = Plan(run.config.phases)
    phase = plan.phase(manifest.step).name if 1 <= manifest.step <= plan.last_step else "none"
    pairs = (("phase", manifest.phase, phase), ("W&B id", manifest.wandb_id, run.wandb_id))
    faults = [f"its {what} is {saw!r}, in the run's config.yaml {want!r}" for what, saw, want in pairs if saw != want]
    try:
        identity.check_checkpoint_identity(manifest, run.folder / CONFIG_FILE)
    except UserError as error:
        faults += [f"{problem.what}: {problem.saw}" for problem in error.problems]
    return "", faults


def _check_weights(run: RunReference, folder: Path, manifest: Manifest) -> CheckResult:
    """model.safetensors: the config's shapes and finite numbers, as read_weights has it, and the precision's dtype."""
    try:
        weights = read_checkpoint_weights(folder, run.meta_model)
    except UserError as error:
        return "", [str(problem) for problem in error.problems]
    faults = []
    if (stored := common_dtype(weights.values())) != DTYPES[manifest.precision]:
        faults.append(f"model.safetensors is in {stored}, but the checkpoint in {manifest.precision}")
    return f"{len(weights)} tensors fit the config", faults


def _check_training_states(run: RunReference, folder: Path, manifest: Manifest) -> CheckResult:
    """What only training reads: modules, masters, moments and random states, file by file."""
    names, world, stage = sorted(manifest.files), manifest.world_size, manifest.zero_stage
    shards = {name: int(found[1]) for name in names if (found := SHARD_NAME.search(name))}
    modules = [name for name in names if name.endswith(MODEL_STATES_SUFFIX)]
    draws = [name for name in names if RNG_STATE_NAME.match(name)]
    faults = list_missing_states(manifest)
    faults += list_stray_files(folder, manifest)
    shapes: Any = None  # DeepSpeed's, of the flat tensors in the shards
    for name in [*modules, *shards, *draws]:
        try:
            tree = _read_training_state(folder / name)
            if name in modules:
                found = _check_module_states(run.meta_model, tree, stage)
                shapes = None if found else tree["param_shapes"]
            elif name in shards:
                found = _check_optimizer_shard(tree["optimizer_state_dict"], shapes, stage, world, shards[name])
            else:
                found = _find_non_finite(tree)
            faults += [f"{name}: {fault}" for fault in found]
        except TrainingStopped as error:
            faults.append(str(error))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            faults.append(f"{name} is not laid out as DeepSpeed does it ({type(error).__name__}: {error})")
    count = sum(p.numel() for p in run.meta_model.parameters())
    ranks = f"{world} ranks" if world > 1 else "one rank"
    return f"masters and moments of {count:,} parameters by {ranks} are finite", faults


def _check_module_states(skeleton: LanguageModel, tree: dict[str, Any], stage: int) -> list[str]:
    """What is wrong with the weights that DeepSpeed loads, and what it says of the optimizer states.

    Under ZeRO-0 these are here too, and masters are the weights themselves.
    """
    faults = _find_non_finite(tree)
    if stage < 3:  # ZeRO-3 puts empty tensors here
        faults += _find_shape_mismatches(
            {name: tuple(x.shape) for name, x in tree["module"].items()},
            {name: tuple(x.shape) for name, x in skeleton.state_dict().items()},
        )
    trainable = {name: tuple(p.shape) for name, p in skeleton.named_parameters() if p.requires_grad}
    if stage > 0:
        flat = {name: tuple(shape) for group in tree["param_shapes"] for name, shape in group.items()}
        return faults + [f"of the optimizer states, {fault}" for fault in _find_shape_mismatches(flat, trainable)]
    want = sum(map(math.prod, trainable.values()))
    for moment in ("exp_avg", "exp_avg_sq"):
        have = sum(x.numel() for key, x in _iterate_tensors(tree["optimizer"]) if key.endswith(f".{moment}"))
        if have != want:
            faults.append(f"{moment} has {have:,} elements, not {want:,}")
    return faults


def _check_optimizer_shard(state: dict[str, Any], shapes: Any, stage: int, world: int, rank: int) -> list[str]:
    """What is wrong with one rank's masters and moments. Padding may hold anything.

    `shapes` are DeepSpeed's, of the parameters in each flat tensor; None if they are wrong themselves.
    """
    if shapes is None:
        return []
    wrote = build_shard_layout(stage, shapes, state.get(GAPS_KEY), world)
    masters, adamw = (next((key for key in keys if key in state), keys[0]) for keys in (MASTER_KEYS, ADAMW_KEYS))
    bad: dict[str, None] = {}  # in order
    for stretch in wrote.parameter_slices(rank):
        stop = stretch.place + stretch.stop - stretch.first
        moments = state[adamw]["state"].get(stretch.tensor, {})
        for what, flat in {"masters": state[masters][stretch.tensor], **moments}.items():
            if flat.dim() and len(flat) < stop:
                bad[f"{what} has {len(flat):,} elements, which end within {stretch.name}"] = None
            elif not _is_finite(flat[stretch.place : stop] if flat.dim() else flat):
                bad[f"{what} of {stretch.name} is not finite"] = None
    return list(bad)


def _check_data_position(run: RunReference, manifest: Manifest) -> CheckResult:
    """Its place in the data, beside the run's ledger, metrics and tokens."""
    state, step, history, faults = manifest.loader, manifest.step, run.history, []
    position = state.get("position", -1)
    if position < step * run.rows_per_step or position % run.rows_per_step:
        faults.append(f"it has used {position:,} rows, but {step} steps take {run.rows_per_step} each")
    elif history is not None and history.chain_after(position) != state.get("ledger"):
        faults.append(f"its first {position:,} rows are not those of {run.folder / LEDGER_FILE}")
    if history is not None and not _rows_logged_at(history, step, 0) <= position < _rows_logged_at(
        history, step + 1, position + 1
    ):
        faults.append(f"it has used {position:,} rows, but metrics.jsonl has others for steps {step} and {step + 1}")
    try:
        if run.loader is not None:
            run.loader.load_state(state)
    except UserError as error:
        faults += [str(problem) for problem in error.problems]
    except (LookupError, TypeError, ValueError) as error:
        faults.append(f"its place in the data cannot be read ({type(error).__name__}: {error})")
    beside = "" if history is None else f" as in {LEDGER_FILE}"
    but = f" (not compared with the data: {run.no_loader_reason})" if run.loader is None else ""
    return f"{position:,} rows{beside}{but}", faults


def _rows_logged_at(history: RowHistory, step: int, unknown: int) -> int:
    """The rows consumed after a step, as metrics.jsonl has it. Those spent after it belong to the step behind it."""
    found = history.rows[history.steps == step]
    return int(found[-1]) if len(found) else unknown


def _check_validation_loss(run: RunReference, folder: Path, manifest: Manifest) -> CheckResult:
    """The validation loss of the checkpoint, computed now, beside the one that was stored."""
    assert run.loader is not None, "`verify` has asked for the data"
    num_rows = manifest.validation_rows or run.config.evaluate.rows
    device = choose_device("auto")
    loss = compute_validation_loss(
        load.load_trained_model(str(folder)), run.loader.validation_batches(num_rows), device
    )
    now = f"validation loss {loss:.5f} nats per token on {num_rows} rows"
    if manifest.validation_loss is None:
        return f"{now} (none was stored to compare with)", []
    share = LOSS_TOLERANCES[manifest.precision]
    tolerance = share * manifest.validation_loss
    reason = f"in {manifest.precision} the order of additions moves a loss by less than {share:g} of itself"
    words = f"{now}, {manifest.validation_loss:.5f} when it was saved (tolerance {tolerance:.1g}: {reason})"
    return (words, []) if abs(loss - manifest.validation_loss) <= tolerance else ("", [words])


@torch.no_grad()
def compute_validation_loss(loaded: LoadedModel, batches: list[Batch], device: torch.device) -> float:
    """Mean loss of the rows, nats per token, in the precision of the checkpoint as far as the device computes in it."""
    dtype = torch.float32 if (loaded.dtype, device.type) == (torch.float16, "cpu") else loaded.dtype
    for parameter in loaded.model.to(device).parameters():
        parameter.data = parameter.data.to(dtype)  # buffers stay in fp32, as DeepSpeed leaves them
    total, num_tokens = 0.0, 0
    for batch in batches:
        there = batch.to(device)
        total += float(loaded.model(there.ids_BT, there.labels_BT, positions_BT=there.positions_BT))
        num_tokens += int((batch.labels_BT != IGNORE_INDEX).sum())
    return total / num_tokens


def _read_training_state(path: Path) -> Any:
    """One of training's own files. Errors: TrainingStopped, as files.read_tensors."""
    from smoltrain.engine.shards import ALLOWED_SHARD_CLASSES

    return files.read_tensors(path, ALLOWED_SHARD_CLASSES)


def _iterate_tensors(tree: Any, key: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """(dotted key, tensor) of all tensors in nested containers."""
    if isinstance(tree, torch.Tensor):
        yield key.lstrip("."), tree
    elif isinstance(tree, dict | list | tuple):
        for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _iterate_tensors(value, f"{key}.{name}")


def _find_non_finite(tree: Any) -> list[str]:
    return [f"{key} is not finite" for key, x in _iterate_tensors(tree) if not _is_finite(x)]


def _is_finite(x: torch.Tensor) -> bool:
    return bool(torch.isfinite(x).all())


def _find_shape_mismatches(have: dict[str, Any], want: dict[str, Any]) -> list[str]:
    """At most three of the parameters whose sizes or shapes are not the config's."""
    names = [name for name in [*want, *(have.keys() - want.keys())] if have.get(name) != want.get(name)]
    return [f"{name} is {have.get(name, 'missing')}, in the config {want.get(name, 'unknown')}" for name in names[:3]]
