"""Whether a checkpoint is what it says: files, shapes, finite numbers, its place in the data, its validation loss."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from smoltrain.checkpoint.identity import RunIdentity, check_checkpoint_identity, identity_of_run
from smoltrain.checkpoint.manifest import Manifest, verify_checkpoint
from smoltrain.config.config_file import CONFIG_FILE, read_provenance
from smoltrain.config.load import cut_micro_batch
from smoltrain.config.schema import Config
from smoltrain.data.rows.batch import Batch
from smoltrain.data.rows.loader import Loader
from smoltrain.data.rows.open_loader import open_loader
from smoltrain.errors import UserError
from smoltrain.files import METRICS_FILE
from smoltrain.inference.device import move_to_best_device
from smoltrain.inference.find_run import read_relocated_config
from smoltrain.inference.load import LoadedModel, load_trained_model, read_checkpoint_weights
from smoltrain.kernels.loss import IGNORE_INDEX
from smoltrain.kernels.precision import DTYPES
from smoltrain.model.build import build_model
from smoltrain.model.hf_weights import common_dtype
from smoltrain.model.interface import LanguageModel
from smoltrain.run.row_ledger import LEDGER_FILE, RowHistory, read_row_history
from smoltrain.run.run_folder import accumulation_steps
from smoltrain.run.training_states import find_state_faults
from smoltrain.schedule import Plan

# How far a loss that is computed again may be off, as a share of it. Other kernels and other batches add the same
# numbers up in another order: measured 6e-6 in bf16 and 4e-8 in fp32. A bf16 model computed in fp32 was 4e-5 off.
LOSS_TOLERANCES = {"bf16": 5e-4, "fp16": 1e-4, "fp32": 1e-6}


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


def open_run_reference(folder: Path, *, needs_data: bool) -> RunReference:
    """Errors: UserError for a config that this version cannot read, and for data that are needed and not there."""
    config = read_relocated_config(folder)
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
    """What only training reads."""
    faults = find_state_faults(run.config, run.meta_model, folder, manifest)
    count = sum(p.numel() for p in run.meta_model.parameters())
    ranks = f"{manifest.world_size} ranks" if manifest.world_size > 1 else "one rank"
    return CheckResult(f"masters and optimizer state of {count:,} parameters by {ranks} are finite", faults)


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
