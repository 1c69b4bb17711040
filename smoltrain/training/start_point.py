"""Where a run begins: at its own newest checkpoint, at another run's, with somebody's weights, or fresh."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from smoltrain import files
from smoltrain.checkpoint.manifest import (
    LAST_SAVED_FILE,
    Manifest,
    find_newest_valid_checkpoint,
    list_checkpoint_steps,
    read_last_saved_step,
    step_folder,
)
from smoltrain.config.config_file import CONFIG_FILE, read_provenance
from smoltrain.config.schema import Config
from smoltrain.data.tokens.prepare import copy_prepared_data
from smoltrain.errors import Problem, UserError
from smoltrain.files import METRICS_FILE
from smoltrain.inference.find_run import find_valid_manifest, is_huggingface_folder, locate_run
from smoltrain.run.row_ledger import LEDGER_FILE
from smoltrain.run.run_folder import SPIKES_FILE
from smoltrain.run.wandb_id import UNDONE_METRICS_FILE
from smoltrain.schedule import Plan
from smoltrain.training.initial_weights import check_source_model


@dataclass(frozen=True)
class StartPoint:
    """Where this start begins. At step 0 with fresh weights where nothing is said."""

    step: int = 0  # steps that are done
    manifest: Manifest | None = None  # of the checkpoint to restore whole, and
    checkpoint: Path | None = None  # its folder
    ancestor: Path | None = None  # the other run that this checkpoint belongs to
    weights_from: str | None = None  # a run, a checkpoint or a Hugging Face folder whose weights alone are taken


def find_start_point(config: Config, say: Callable[[str], None]) -> StartPoint:
    """The run's own newest valid checkpoint; if it has none yet, what `init` names; else step 0 with fresh weights.

    Reads and hashes every file of that checkpoint. Errors: UserError when checkpoints exist but none verifies, when
    there were some that are gone, or when init.from is nothing to begin with.
    """
    run = config.run_folder
    checkpoints = run / "checkpoints"
    last_saved = read_last_saved_step(run)
    manifest = find_newest_valid_checkpoint(checkpoints, say, trains=True)
    if manifest:
        if last_saved > max(list_checkpoint_steps(checkpoints)):
            say(
                f"goes on from step {manifest.step}: its checkpoints of later steps, to {last_saved}, are gone; "
                f"what {METRICS_FILE} told of them is kept in {UNDONE_METRICS_FILE}"
            )
        return StartPoint(manifest.step, manifest, step_folder(checkpoints, manifest.step))
    evidence = _find_evidence_of_checkpoint(run, last_saved)
    if evidence:
        raise UserError(
            Problem(
                what="the checkpoints of this run are gone",
                saw=f"none in {checkpoints}, but {evidence}",
                want="the checkpoints where they were",
                change=f"{checkpoints} (is a disk missing?), or run.name; without {run} the run begins from scratch",
            )
        )
    reached_step = max((line["step"] for line in files.read_jsonl(run / METRICS_FILE, say=say)), default=0)
    point = _find_initial_point(config, say)
    if reached_step > point.step:
        say(f"no checkpoint was saved before the run ended, so its {reached_step - point.step} steps are done again")
    return point


def _find_initial_point(config: Config, say: Callable[[str], None]) -> StartPoint:
    """Where a run begins that has no checkpoint of its own, as `init` says. Errors: UserError."""
    source = config.init.source
    if source is None:
        return StartPoint()
    if config.init.load == "weights":
        check_source_model(source, config)
        say(f"the weights are those of {source}; step, optimizer state and data begin anew")
        return StartPoint(weights_from=source)
    if is_huggingface_folder(Path(source)):
        raise UserError(
            Problem(
                what="a Hugging Face folder has weights and nothing else",
                saw="init.load=all",
                want="init.load=weights, or a run",
                change="init.load or init.from",
            )
        )
    ancestor, step = locate_run(source, config.run.folder, "init.from")
    manifest = find_valid_manifest(ancestor, step, "init.from", say)
    say(f"goes on from step {manifest.step} (phase {manifest.phase}) of {ancestor}, with everything that it had")
    checkpoint = step_folder(ancestor / "checkpoints", manifest.step)
    return StartPoint(manifest.step, manifest, checkpoint, ancestor)


def _find_evidence_of_checkpoint(run: Path, last_saved: int) -> str | None:
    """What shows that a run without checkpoints has had one, in words; None if nothing does."""
    if last_saved:
        return f"{run / LAST_SAVED_FILE} tells of step {last_saved}"
    lines = files.read_jsonl(run / METRICS_FILE, say=lambda _: None)
    saved_steps = {line["step"] for line in lines if "speed/checkpoint_pause_s" in line}
    if len(saved_steps) > 1:  # one is published before the next is begun
        return f"{run / METRICS_FILE} tells that one of step {min(saved_steps)} was written"
    config_file = run / CONFIG_FILE
    starts = read_provenance(config_file)["starts"] if config_file.exists() else []
    # The first one may have gone on from another run; later ones, before there was a checkpoint, say so.
    own = [*starts[:1], *(start for start in starts[1:] if "from_run" not in start)]
    first_steps = [start["from_step"] for start in own if type(start.get("from_step")) is int]
    if first_steps and max(first_steps) > first_steps[0]:
        return f"{config_file} tells of a start from step {max(first_steps)}"
    return None


def is_validation_missing(config: Config, point: StartPoint, last_step: int) -> bool:
    """Whether a validation was due at the step of the checkpoint and a signal forestalled it: it is made up for.

    `last_step` is where this command ends: a run that has gone further has nothing to make up for.
    """
    if point.manifest is None or point.manifest.validation_loss is not None or point.step > last_step:
        return False
    due = Plan(config.phases).is_due(point.step, config.evaluate.every)
    return due and read_validation_loss(config.run_folder, point.step) is None


def read_validation_loss(run_folder: Path, step: int) -> float | None:
    """The validation loss of this very step, nats per token, as the run's metrics tell; None if they do not."""
    name = "validation/loss_nats_per_token"
    for line in files.read_jsonl(run_folder / METRICS_FILE):
        if line["step"] == step and name in line:
            return line[name]
    return None


def copy_ancestor_data(config: Config, point: StartPoint) -> None:
    """Copy the ancestor's tokenizer, tokens and spikes, once, and its ledger, by one process.

    A position then means the same rows as it did there, and the same ones are passed over. The ledger is copied at each
    start before the run's first checkpoint: the ancestor may have trained on since, and its own rows are undone.
    """
    run = config.run_folder
    ancestor = point.ancestor
    if ancestor is None:
        return
    run.mkdir(parents=True, exist_ok=True)
    _copy_if_there(ancestor / LEDGER_FILE, run)
    if (run / "data" / "index.json").exists():
        return  # and its journal of spikes, to which it may have added its own
    _copy_if_there(ancestor / SPIKES_FILE, run)
    copy_prepared_data(ancestor, run)  # last: by its index a later start knows that all is there


def _copy_if_there(source: Path, folder: Path) -> None:
    if source.exists():
        shutil.copy(source, folder / source.name)
