"""Where a run begins: at its own newest checkpoint, at another run's, with somebody's weights, or fresh."""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from smoltrain.config.load import read_run_config
from smoltrain.config.schema import Config, ModelSection, TransformersSection
from smoltrain.data.tokenizers.companions import (
    GENERATION_CONFIG,
    eos_token_ids,
    read_companions,
    read_generation_config,
)
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.errors import Problem, UserError, format_value
from smoltrain.inference import load
from smoltrain.inference.load import find_valid_manifest, has_same_tokenizer, is_huggingface_folder, locate_run
from smoltrain.model.hf_format import check_hf_tensors, read_hf_weights
from smoltrain.model.interface import LanguageModel
from smoltrain.model.transformers_model import HuggingFaceModel
from smoltrain.run.row_ledger import LEDGER_FILE
from smoltrain.run.run_folder import SPIKES_FILE
from smoltrain.run.wandb_id import UNDONE_METRICS_FILE
from smoltrain.schedule import Plan

METRICS_FILE = "metrics.jsonl"
# Keys of transformers' configs that act in training only, or say how fresh weights are drawn.
TRAINING_ONLY_KEYS = re.compile(r"drop|pdrop|initializer|init_std|use_cache")


@dataclass(frozen=True)
class StartPoint:
    """What stands before the first step of this start."""

    step: int = 0  # steps that are done
    manifest: Manifest | None = None  # of the checkpoint to restore whole, and
    checkpoint: Path | None = None  # its folder
    ancestor: Path | None = None  # the other run that this checkpoint belongs to
    weights_from: str | None = None  # a run, a checkpoint or a Hugging Face folder whose weights alone are taken


def find_start_point(config: Config, say: Callable[[str], None]) -> StartPoint:
    """The run's own newest valid checkpoint; if it has none yet, what `init` names; else step 0 with fresh weights.

    Errors: UserError when checkpoints exist but none verifies, when there were some that are gone, or when init.from
    is nothing to begin with.
    """
    run, own = config.run_folder, config.run_folder / "checkpoints"
    saved = read_last_saved_step(run)
    if manifest := find_newest_valid_checkpoint(own, say, trains=True):
        if saved > max(list_checkpoint_steps(own)):
            gone, step = f"its checkpoints of later steps, to {saved}, are gone", manifest.step
            say(f"goes on from step {step}: {gone}; what {METRICS_FILE} told of them is kept in {UNDONE_METRICS_FILE}")
        return StartPoint(manifest.step, manifest, step_folder(own, manifest.step))
    if evidence := f"{run / LAST_SAVED_FILE} tells of step {saved}" if saved else _find_evidence_of_checkpoint(run):
        what, saw = "the checkpoints of this run are gone", f"none in {own}, but {evidence}"
        change = f"{own} (is a disk missing?), or run.name; without {run} the run begins from scratch"
        raise UserError(Problem(what, saw, "the checkpoints where they were", change))
    if done := max((line["step"] for line in files.read_jsonl(run / METRICS_FILE, say=say)), default=0):
        say(f"no checkpoint was saved before the run ended, so its {done} steps are done again")
    source = config.init.source
    if source is None:
        return StartPoint()
    if config.init.load == "weights":
        _check_source_model(source, config)
        say(f"the weights are those of {source}; step, moments and data begin anew")
        return StartPoint(weights_from=source)
    if is_huggingface_folder(Path(source)):
        what = "a Hugging Face folder has weights and nothing else"
        raise UserError(Problem(what, "init.load=all", "init.load=weights, or a run", "init.load or init.from"))
    run, step = locate_run(source, config.run.folder, "init.from")
    manifest = find_valid_manifest(run, step, "init.from", say)
    say(f"goes on from step {manifest.step} (phase {manifest.phase}) of {run}, with everything that it had")
    return StartPoint(manifest.step, manifest, step_folder(run / "checkpoints", manifest.step), run)


def is_validation_missing(config: Config, origin: StartPoint, last_step: int) -> bool:
    """Whether a validation was due at the step of the checkpoint, and a signal forestalled it: it is made up for.

    `last_step` is where this command ends: a run that has gone further has nothing to make up for.
    """
    if origin.manifest is None or origin.manifest.validation_loss is not None or origin.step > last_step:
        return False
    due = Plan(config.phases).is_due(origin.step, config.evaluate.every)
    return due and read_validation_loss(config.run_folder, origin.step) is None


def read_validation_loss(run_folder: Path, step: int) -> float | None:
    """The validation loss of this very step, nats per token, as the run's metrics tell; None if they do not."""
    name = "validation/loss_nats_per_token"
    lines = files.read_jsonl(run_folder / "metrics.jsonl")
    return next((line[name] for line in lines if line["step"] == step and name in line), None)


def _find_evidence_of_checkpoint(run: Path) -> str:
    """What shows that a run without `saved.json` has had a checkpoint; '' if nothing does."""
    told = files.read_jsonl(run / METRICS_FILE, say=lambda _: None)
    begun = {line["step"] for line in told if "speed/checkpoint_pause_s" in line}
    if len(begun) > 1:  # one is published before the next is begun
        return f"{run / METRICS_FILE} tells that one of step {min(begun)} was written"
    config = run / CONFIG_FILE
    starts = read_provenance(config)["starts"] if config.exists() else []
    steps = [step for start in starts if type(step := start.get("from_step")) is int]
    if steps and max(steps) > steps[0]:  # the first one may have gone on from another run
        return f"{config} tells of a start from step {max(steps)}"
    return ""


def copy_ancestor_data(config: Config, origin: StartPoint) -> None:
    """Copy the ancestor's tokenizer, tokens, ledger and spikes: a position then means the same rows, and the same ones
    are passed over. Once, by one process.
    """
    own = config.run_folder
    if origin.ancestor is None or (own / "data" / "index.json").exists():
        return
    for name in ("tokenizer", "data"):
        shutil.rmtree(own / name, ignore_errors=True)  # index.json comes last, so what stands here is half a copy
    shutil.copytree(origin.ancestor / "tokenizer", own / "tokenizer")
    for name in (LEDGER_FILE, SPIKES_FILE):
        if (origin.ancestor / name).exists():
            shutil.copy(origin.ancestor / name, own / name)
    shutil.copytree(origin.ancestor / "data", own / "data", ignore=shutil.ignore_patterns("index.json"))
    shutil.copy(origin.ancestor / "data" / "index.json", own / "data" / "index.json")


def weight_defining_settings(section: ModelSection | TransformersSection) -> dict[str, Any]:
    """What of a model's section the shape or the meaning of its weights depends on; the rest may be another now."""
    values = section.model_dump()
    if isinstance(section, TransformersSection):
        said = {f"config.{key}": value for key, value in values.pop("config").items()}
        return values | {key: value for key, value in said.items() if not TRAINING_ONLY_KEYS.search(key)}
    free = {"dropout", "attention_dropout", "initializer_range"}
    if section.positions == "rope":
        free.add("max_position_embeddings")  # no table holds them
    return {key: value for key, value in values.items() if key not in free}


def load_initial_weights(origin: StartPoint, config: Config, model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Put the named weights into a model that was just built. Errors: UserError if shape or tokenizer are others."""
    assert origin.weights_from is not None
    if isinstance(model, HuggingFaceModel) and is_huggingface_folder(Path(origin.weights_from)):
        _load_huggingface_weights(Path(origin.weights_from), model)
        return
    loaded = load.load_trained_model(origin.weights_from, runs=config.run.folder)
    _check_same_model(config, loaded.model.section)
    if loaded.tokenizer.fingerprint() != tokenizer.fingerprint():
        what, want = "the weights were trained with another tokenizer", f"the one beside them in {origin.weights_from}"
        raise UserError(Problem(what, config.tokenizer.name, want, "tokenizer.name"))
    model.load_state_dict(loaded.model.state_dict())


def copy_generation_config(
    origin: StartPoint, config: Config, tokenizer: Tokenizer, say: Callable[[str], None]
) -> None:
    """Beside the tokenizer: how the authors of the weights want them to write, and all ids that end a text.

    Once, by one process, when a run begins. What another tokenizer's ids mean is not known, so it is left out.
    """
    kept = config.run_folder / "tokenizer" / GENERATION_CONFIG
    kept.unlink(missing_ok=True)  # of a start before, which took other weights
    source = origin.weights_from
    if source is None:
        return
    theirs = is_huggingface_folder(Path(source))
    folder = Path(source) if theirs else locate_run(source, config.run.folder, "init.from")[0] / "tokenizer"
    about = read_generation_config(folder)
    if (end := tokenizer.token_to_id(read_companions(folder).token_for_role("eos_token"))) is not None:
        ends = list(dict.fromkeys([*eos_token_ids(about), end]))
        about["eos_token_id"] = ends if len(ends) > 1 else end
    if about and theirs and not has_same_tokenizer(folder, tokenizer):
        say(f"{GENERATION_CONFIG} of {source} is left out: its token ids are those of another tokenizer")
    elif about:
        files.write_json_file(kept, about)


def _check_source_model(source: str, config: Config) -> None:
    """Of a run, as its config tells, before anything slow begins. Errors: UserError, as `load_weights`."""
    if not is_huggingface_folder(Path(source)):
        run, _ = locate_run(source, config.run.folder, "init.from")
        _check_same_model(config, read_run_config(run / "config.yaml").model)


def _check_same_model(config: Config, section: ModelSection | TransformersSection) -> None:
    """Errors: UserError for each key by which weights of `section` would mean something else."""
    now, was = weight_defining_settings(config.model), weight_defining_settings(section)
    wrong = [
        Problem(
            f"the weights are of another model: {key}",
            format_value(now.get(key)),
            format_value(was.get(key)),
            f"model.{key} or init.from",
        )
        for key in sorted(now.keys() | was.keys())
        if now.get(key) != was.get(key)
    ]
    if wrong:
        raise UserError(*wrong)


def _load_huggingface_weights(folder: Path, model: HuggingFaceModel) -> None:
    """A Hugging Face folder's tensors into transformers' own class. Errors: UserError for those of another model."""
    weights = {f"inner.{name}": x for name, x in read_hf_weights(folder).items()}
    names = {name: x.shape for name, x in model.named_parameters(remove_duplicate=False)}
    tied = names.keys() - dict(model.named_parameters()).keys()
    check_hf_tensors({n: s for n, s in names.items() if n not in tied or n in weights}, weights, folder)
    model.load_state_dict(weights, strict=False)
