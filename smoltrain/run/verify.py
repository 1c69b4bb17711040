"""`smoltrain verify`: whether a run and its checkpoints are what they say. Nothing is written, and the run may go on.

Of a checkpoint: its files, the shapes, finite numbers, its place in the data, and its validation loss.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from smoltrain import files
from smoltrain.checkpoint.identity import RunIdentity, check_checkpoint_identity, identity_of_run
from smoltrain.checkpoint.manifest import (
    Manifest,
    list_checkpoint_steps,
    list_missing_states,
    list_stray_files,
    list_training_files,
    read_last_saved_step,
    step_folder,
    verify_checkpoint,
)
from smoltrain.config.config_file import CONFIG_FILE, find_config_damage, read_provenance
from smoltrain.config.load import cut_micro_batch, read_run_config
from smoltrain.config.schema import Config
from smoltrain.data.documents.bad_records import BAD_RECORDS_FILE
from smoltrain.data.rows.batch import Batch
from smoltrain.data.rows.loader import Loader
from smoltrain.data.rows.open_loader import open_loader
from smoltrain.data.tokens.prepare import inspect_prepared_data
from smoltrain.engine.optimizer import OPTIMIZERS
from smoltrain.engine.optimizer_kind import is_elementwise_state
from smoltrain.engine.reshard import GAPS_KEY, build_shard_layout, find_state_keys
from smoltrain.errors import TrainingStopped, UserError
from smoltrain.files import METRICS_FILE
from smoltrain.inference.device import move_to_best_device
from smoltrain.inference.load import (
    LoadedModel,
    find_checkpoint_folder,
    find_run_folder,
    load_trained_model,
    read_checkpoint_weights,
)
from smoltrain.kernels.loss import IGNORE_INDEX
from smoltrain.kernels.precision import DTYPES
from smoltrain.model.build import build_model
from smoltrain.model.hf_format import common_dtype
from smoltrain.model.interface import LanguageModel
from smoltrain.run.row_ledger import LEDGER_FILE, RowHistory, read_row_history, verify_ledgers
from smoltrain.run.run_folder import SAMPLES_FILE, SPIKES_FILE, accumulation_steps
from smoltrain.run.wandb_id import UNDONE_METRICS_FILE
from smoltrain.schedule import Plan

# How far a loss that is computed again may be off, as a share of it. Other kernels and other batches add the same
# numbers up in another order: measured 6e-6 in bf16 and 4e-8 in fp32. A bf16 model computed in fp32 was 4e-5 off.
LOSS_TOLERANCES = {"bf16": 5e-4, "fp16": 1e-4, "fp32": 1e-6}
# The run's records, with the keys of their lines, but for metrics.jsonl, which the ledger is compared with.
RECORD_KEYS = {
    UNDONE_METRICS_FILE: ("step",),
    SAMPLES_FILE: ("step",),
    SPIKES_FILE: ("step",),
    f"data/{BAD_RECORDS_FILE}": ("source",),
}


class CheckResult(NamedTuple):
    """Of one check."""

    summary: str  # what was looked at, in words; "" for nothing worth a word
    faults: list[str]


@dataclass(frozen=True)
class RunReference:
    """What the checkpoints of a run folder must agree with."""

    folder: Path
    config: Config
    identity: RunIdentity
    wandb_id: str
    meta_model: LanguageModel  # of the config, without numbers
    history: RowHistory | None  # of its rows; None without a ledger
    loader: Loader | None  # on one rank
    no_loader_reason: str | None  # why there is none


def verify_run(folder: Path, *, forward: bool = False) -> bool:
    """Whether nothing is wrong with a run: records, checkpoints, tokens; prints what was looked at.

    `forward` also computes the validation loss of each checkpoint again. Errors: UserError for a run without a row and
    without a checkpoint, a config that cannot be read, and data that `forward` lacks.
    """
    steps = list_checkpoint_steps(folder / "checkpoints")
    is_sound = _verify_records(folder, steps)
    if steps:
        run = open_run_reference(folder, needs_data=forward)
        for step in steps:
            is_sound = _print_inspection(run, step, forward=forward) and is_sound
    return _verify_tokens(folder) and is_sound


def verify_one_checkpoint(folder: Path, step: int, *, forward: bool = False) -> bool:
    """Whether nothing is wrong with the checkpoint of a step; prints what was looked at.

    Errors: UserError if there is none, and those of `verify_run` for config and data.
    """
    find_checkpoint_folder(folder, step, "the RUN argument")
    return _print_inspection(open_run_reference(folder, needs_data=forward), step, forward=forward)


def compare_runs(source: str, other: str) -> bool:
    """Whether two runs trained on the same rows; prints where they part. Errors: UserError for a run without a row."""
    return verify_ledgers([find_run_folder(source), find_run_folder(other)])


def _verify_records(folder: Path, steps: list[int]) -> bool:
    """Whether ledger, journals and config.yaml are what was written; prints what was looked at."""
    try:
        is_sound = verify_ledgers([folder])
    except UserError as error:
        if not steps:
            raise
        print(error)
        is_sound = False
    faults = [*_find_damaged_records(folder), find_config_damage(folder), _find_lost_checkpoints(folder, steps)]
    for fault in faults:
        if fault:
            print(fault)
            is_sound = False
    return is_sound


def _find_damaged_records(folder: Path) -> list[str]:
    descriptions: list[str] = []
    for name, keys in RECORD_KEYS.items():
        damaged = [line for line in files.read_jsonl_lines(folder / name, keys) if line.fault]
        if damaged:
            descriptions.append(files.describe_damaged_lines(folder / name, damaged))
    return descriptions


def _find_lost_checkpoints(folder: Path, steps: list[int]) -> str | None:
    """A fault if the run has saved checkpoints of which none is left."""
    saved = read_last_saved_step(folder)
    if steps or not saved:
        return None
    return f"{folder / 'checkpoints'} is empty, but the run has saved step {saved}"


def _print_inspection(run: RunReference, step: int, *, forward: bool) -> bool:
    """Whether a checkpoint is sound."""
    path = step_folder(run.folder / "checkpoints", step)
    summary, faults = inspect_checkpoint(run, path, forward=forward)
    if not path.is_dir():  # a run under way has deleted it meanwhile
        return True
    print(f"{path}: {summary}")
    for fault in faults:
        print(f"{path} fails verification: {fault}")
    return not faults


def _verify_tokens(folder: Path) -> bool:
    """Whether a run's tokens and tokenizer are what was written; prints what was looked at."""
    path = folder / "data"
    try:
        summary, faults = inspect_prepared_data(_read_relocated_config(folder))
    except UserError as error:  # they are away, or in a cache that is
        print(f"{path}: not looked into ({error.problems[0]})")
        return not (path / "index.json").exists()
    for fault in faults:
        print(f"{path} fails verification: {fault}")
    if not faults:
        print(f"{path}: {summary}")
    return not faults


def _read_relocated_config(folder: Path) -> Config:
    """A run's own config, wherever its folder lies now. Errors: UserError for one that this version cannot read."""
    config = read_run_config(folder / CONFIG_FILE)
    here = config.run.model_copy(update={"folder": folder.parent, "name": folder.name})
    return config.model_copy(update={"run": here})


def open_run_reference(folder: Path, *, needs_data: bool) -> RunReference:
    """Errors: UserError for a config that this version cannot read, and for data that are needed and not there."""
    config = _read_relocated_config(folder)
    provenance = read_provenance(folder / CONFIG_FILE)
    rows = provenance["rows_per_step"]
    loader = None
    no_loader_reason = None
    try:
        loader = open_loader(
            cut_micro_batch(config, rows, 1), 0, 1, rows_per_step=rows, accumulation=accumulation_steps(config, rows, 1)
        )
    except UserError as error:
        if needs_data:
            raise
        no_loader_reason = str(error.problems[0])
    history = None
    with contextlib.suppress(UserError):  # without a row, which `verify_ledgers` says
        history = read_row_history(folder)
    own = identity_of_run(config, provenance)
    model = build_model(config.model, device="meta")
    return RunReference(folder, config, own, provenance["wandb_id"], model, history, loader, no_loader_reason)


def inspect_checkpoint(run: RunReference, folder: Path, *, forward: bool = False) -> CheckResult:
    """One checkpoint of a run. Where a file is not what was written, the others are not looked into."""
    manifest = verify_checkpoint(folder)
    if isinstance(manifest, str):
        return CheckResult("not looked into", [manifest])
    mib = sum(record["bytes"] for record in manifest.files.values()) / 2**20
    results = [
        CheckResult(f"{len(manifest.files)} files ({mib:,.1f} MiB) are as they were written", []),
        _check_manifest(run, manifest),
        _check_weights(run, folder, manifest),
        _check_training_states(run, folder, manifest),
        _check_data_position(run, manifest),
    ]
    if forward and not any(result.faults for result in results):
        results.append(_check_validation_loss(run, folder, manifest))
    summaries = [result.summary for result in results if result.summary and not result.faults]
    return CheckResult(", ".join(summaries), [fault for result in results for fault in result.faults])


def _check_manifest(run: RunReference, manifest: Manifest) -> CheckResult:
    """What the manifest says of its run, beside the run's config.yaml."""
    plan = Plan(run.config.phases)
    phase = plan.phase(manifest.step).name if 1 <= manifest.step <= plan.last_step else "none"
    faults: list[str] = []
    for what, saw, want in (("phase", manifest.phase, phase), ("W&B id", manifest.wandb_id, run.wandb_id)):
        if saw != want:
            faults.append(f"its {what} is {saw!r}, in the run's config.yaml {want!r}")
    try:
        check_checkpoint_identity(manifest.identity, manifest.step, run.identity, run.folder / CONFIG_FILE)
    except UserError as error:
        faults += [f"{problem.what}: {problem.saw}" for problem in error.problems]
    return CheckResult("", faults)


def _check_weights(run: RunReference, folder: Path, manifest: Manifest) -> CheckResult:
    """model.safetensors: the config's shapes, finite numbers, and the dtype of the checkpoint's precision."""
    try:
        weights = read_checkpoint_weights(folder, run.meta_model)
    except UserError as error:
        return CheckResult("", [str(problem) for problem in error.problems])
    dtype = common_dtype(weights.values())
    faults: list[str] = []
    if dtype != DTYPES[manifest.precision]:
        faults.append(f"model.safetensors is in {dtype}, but the checkpoint in {manifest.precision}")
    return CheckResult(f"{len(weights)} tensors fit the config", faults)


def _check_training_states(run: RunReference, folder: Path, manifest: Manifest) -> CheckResult:
    """What only training reads: DeepSpeed's copy of the weights, fp32 masters, the optimizer's state, random states."""
    training = list_training_files(manifest)
    stage = manifest.zero_stage
    faults = list_missing_states(manifest) + list_stray_files(folder, manifest)
    param_shapes: Any = None  # DeepSpeed's, of the flat tensors in the shards; None where they are wrong
    for name in training.modules:
        with _collect_file_faults(name, faults):
            tree = _read_training_state(folder / name)
            module_faults = _check_module_states(run, tree, stage)
            faults += [f"{name}: {fault}" for fault in module_faults]
            param_shapes = None if module_faults else tree["param_shapes"]
    for name, rank in training.shards:
        with _collect_file_faults(name, faults):
            state = _read_training_state(folder / name)["optimizer_state_dict"]
            if param_shapes is not None:
                shard_faults = find_shard_faults(state, param_shapes, stage, manifest.world_size, rank)
                faults += [f"{name}: {fault}" for fault in shard_faults]
    for name, _ in training.rng_states:
        with _collect_file_faults(name, faults):
            faults += [f"{name}: {fault}" for fault in _find_non_finite(_read_training_state(folder / name))]
    count = sum(p.numel() for p in run.meta_model.parameters())
    ranks = f"{manifest.world_size} ranks" if manifest.world_size > 1 else "one rank"
    return CheckResult(f"masters and optimizer state of {count:,} parameters by {ranks} are finite", faults)


@contextlib.contextmanager
def _collect_file_faults(name: str, faults: list[str]) -> Iterator[None]:
    """What the block raises because a file of training cannot be read, or is laid out otherwise, becomes a fault."""
    try:
        yield
    except TrainingStopped as error:
        faults.append(str(error))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        faults.append(f"{name} is not laid out as DeepSpeed does it ({type(error).__name__}: {error})")


def _check_module_states(run: RunReference, tree: dict[str, Any], stage: int) -> list[str]:
    """What is wrong with the weights that DeepSpeed loads, and with the shapes of the optimizer states beside them.

    Under ZeRO-0 the optimizer states are here too, and the weights are their own masters.
    """
    faults = _find_non_finite(tree)
    if stage < 3:  # ZeRO-3 puts empty tensors here
        faults += _find_shape_mismatches(
            {name: tuple(x.shape) for name, x in tree["module"].items()},
            {name: tuple(x.shape) for name, x in run.meta_model.state_dict().items()},
        )
    trainable = {name: tuple(p.shape) for name, p in run.meta_model.named_parameters() if p.requires_grad}
    if stage > 0:
        flat = {name: tuple(shape) for group in tree["param_shapes"] for name, shape in group.items()}
        return faults + [f"of the optimizer states, {fault}" for fault in _find_shape_mismatches(flat, trainable)]
    kind = OPTIMIZERS[run.config.optimizer.kind]
    wants: dict[str, int] = defaultdict(int)
    for group in kind.parameter_groups(run.meta_model, run.config.optimizer):
        for state_name in kind.names_of_state(group):
            wants[state_name] += sum(parameter.numel() for parameter in group["params"])
    for state_name, want in wants.items():
        have = sum(x.numel() for key, x in _iterate_tensors(tree["optimizer"]) if key.endswith(f".{state_name}"))
        if have != want:
            faults.append(f"{state_name} has {have:,} elements, not {want:,}")
    return faults


def find_shard_faults(state: dict[str, Any], param_shapes: Any, stage: int, world_size: int, rank: int) -> list[str]:
    """What is wrong with one rank's masters and optimizer state. Padding may hold anything.

    `param_shapes` are DeepSpeed's, of the parameters in each flat tensor.
    """
    layout = build_shard_layout(stage, param_shapes, state.get(GAPS_KEY), world_size)
    masters, optimizer = find_state_keys(state)
    faults: list[str] = []
    for part in layout.parameter_slices(rank):
        stop = part.offset + part.stop - part.first
        tensors = {"masters": state[masters][part.tensor], **state[optimizer]["state"].get(part.tensor, {})}
        for what, value in tensors.items():
            is_elementwise = is_elementwise_state(value)
            if is_elementwise and len(value) < stop:
                faults.append(f"{what} has {len(value):,} elements, which end within {part.name}")
            elif not torch.isfinite(value[part.offset : stop] if is_elementwise else value).all():
                faults.append(f"{what} of {part.name} is not finite")
    return list(dict.fromkeys(faults))  # a counter's is met once for each parameter


def _check_data_position(run: RunReference, manifest: Manifest) -> CheckResult:
    """Its place in the data, beside the run's ledger, metrics and tokens."""
    step = manifest.step
    history = run.history
    position = manifest.loader.get("position", -1)
    faults: list[str] = []
    rows_per_step = run.identity["rows_per_step"]
    if position < step * rows_per_step or position % rows_per_step:
        faults.append(f"it has used {position:,} rows, but {step} steps take {rows_per_step} each")
    elif history and history.chain_after(position) != manifest.loader.get("ledger", ""):
        faults.append(f"its first {position:,} rows are not those of {run.folder / LEDGER_FILE}")
    if history and not history.allows_checkpoint(step, position):
        faults.append(f"it has used {position:,} rows, but {METRICS_FILE} has others for steps {step} and {step + 1}")
    try:
        if run.loader:
            run.loader.load_state(manifest.loader)
    except UserError as error:
        faults += [str(problem) for problem in error.problems]
    except (LookupError, TypeError, ValueError) as error:
        faults.append(f"its place in the data cannot be read ({type(error).__name__}: {error})")
    ledger = f" as in {LEDGER_FILE}" if history else ""
    no_data = "" if run.loader else f" (not compared with the data: {run.no_loader_reason})"
    return CheckResult(f"{position:,} rows{ledger}{no_data}", faults)


def _check_validation_loss(run: RunReference, folder: Path, manifest: Manifest) -> CheckResult:
    """The validation loss of the checkpoint, computed now, beside the one that was stored."""
    assert run.loader is not None, "who asks for the loss has asked for the data"
    num_rows = manifest.validation_rows or run.config.evaluate.rows
    batches = run.loader.validation_batches(num_rows)
    loaded = load_trained_model(str(folder))
    device, reason = move_to_best_device(loaded.model)
    loss = _compute_validation_loss(loaded, batches, device)
    now = f"validation loss {loss:.5f} nats per token on {num_rows} rows"
    if reason is not None:
        now = f"{now} ({reason})"
    stored = manifest.validation_loss
    if stored is None:
        return CheckResult(f"{now} (none was stored to compare with)", [])
    share = LOSS_TOLERANCES[manifest.precision]
    tolerance = share * stored
    rounding = f"in {manifest.precision} the order of additions moves a loss by less than {share:g} of itself"
    words = f"{now}, {stored:.5f} when it was saved (tolerance {tolerance:.1g}: {rounding})"
    if abs(loss - stored) <= tolerance:
        return CheckResult(words, [])
    return CheckResult("", [words])


@torch.no_grad()
def _compute_validation_loss(loaded: LoadedModel, batches: list[Batch], device: torch.device) -> float:
    """Mean loss of the rows, nats per token, in the precision of the checkpoint as far as the device computes in it."""
    dtype = torch.float32 if (loaded.dtype, device.type) == (torch.float16, "cpu") else loaded.dtype
    for parameter in loaded.model.to(device).parameters():
        parameter.data = parameter.data.to(dtype)  # buffers stay in fp32, as DeepSpeed leaves them
    total = 0.0
    num_tokens = 0
    for batch in batches:
        there = batch.to(device)
        total += float(loaded.model(there.ids_BT, there.labels_BT, **there.document_arguments()))
        num_tokens += int((batch.labels_BT != IGNORE_INDEX).sum())
    return total / num_tokens


def _read_training_state(path: Path) -> Any:
    """One of training's own files. Errors: TrainingStopped, as files.read_tensors."""
    from smoltrain.engine.shards import ALLOWED_SHARD_CLASSES  # imports DeepSpeed, which takes seconds

    return files.read_tensors(path, ALLOWED_SHARD_CLASSES)


def _iterate_tensors(tree: Any, key: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """(dotted key, tensor) of all tensors in nested containers."""
    if isinstance(tree, torch.Tensor):
        yield key.lstrip("."), tree
    elif isinstance(tree, dict | list | tuple):
        for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _iterate_tensors(value, f"{key}.{name}")


def _find_non_finite(tree: Any) -> list[str]:
    return [f"{key} is not finite" for key, x in _iterate_tensors(tree) if not torch.isfinite(x).all()]


def _find_shape_mismatches(have: dict[str, Any], want: dict[str, Any]) -> list[str]:
    """At most three of the parameters whose shapes are not the config's."""
    names = [name for name in want | have if have.get(name) != want.get(name)]
    return [f"{name} is {have.get(name, 'missing')}, in the config {want.get(name, 'unknown')}" for name in names[:3]]
