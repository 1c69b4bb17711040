"""`smoltrain verify`: whether a run and its checkpoints are what they say.

Nothing is written, and the run may go on.
"""

from pathlib import Path

from smoltrain import files
from smoltrain.checkpoint.manifest import list_checkpoint_steps, read_last_saved_step, step_folder
from smoltrain.config.config_file import find_config_damage
from smoltrain.data.documents.bad_records import BAD_RECORDS_FILE
from smoltrain.data.tokens.load_prepared import inspect_prepared_data
from smoltrain.errors import UserError
from smoltrain.inference.find_run import find_checkpoint_folder, find_run_folder, read_relocated_config
from smoltrain.run.inspect_checkpoint import RunReference, inspect_checkpoint, open_run_reference
from smoltrain.run.row_ledger import verify_ledgers
from smoltrain.run.run_folder import SAMPLES_FILE, SPIKES_FILE
from smoltrain.run.wandb_id import UNDONE_METRICS_FILE

# The run's records, with the keys of their lines, but for metrics.jsonl, which the ledger is compared with.
RECORD_KEYS = {
    UNDONE_METRICS_FILE: ("step",),
    SAMPLES_FILE: ("step",),
    SPIKES_FILE: ("step",),
    f"data/{BAD_RECORDS_FILE}": ("source",),
}


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
        summary, faults = inspect_prepared_data(read_relocated_config(folder))
    except UserError as error:  # they are away, or in a cache that is
        print(f"{path}: not looked into ({error.problems[0]})")
        return not (path / "index.json").exists()
    for fault in faults:
        print(f"{path} fails verification: {fault}")
    if not faults:
        print(f"{path}: {summary}")
    return not faults
