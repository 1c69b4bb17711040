"""Somebody's weights for a run that begins: a run's, a checkpoint's, or those of a Hugging Face folder."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smoltrain import files
from smoltrain.config.load import read_run_config
from smoltrain.config.schema import AnyModelSection, Config, OwnModelSection, TransformersSection
from smoltrain.data.tokenizers.companions import (
    GENERATION_CONFIG,
    eos_token_ids,
    read_companions,
    read_generation_config,
)
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.errors import Problem, UserError, format_value
from smoltrain.inference.find_run import ANY_MODEL, is_huggingface_folder, locate_run
from smoltrain.inference.load import has_same_tokenizer, load_trained_model
from smoltrain.model.hf_weights import check_hf_tensors, read_hf_weights
from smoltrain.model.interface import LanguageModel
from smoltrain.model.transformers_model import HuggingFaceModel

# Keys of transformers' configs that act in training only, or say how fresh weights are drawn.
TRAINING_ONLY_KEYS = re.compile(r"drop|pdrop|initializer|init_std|use_cache")


def check_source_model(source: str, config: Config) -> None:
    """Compare a run's model with the config's, before anything slow begins. Errors: UserError for another model."""
    if not is_huggingface_folder(Path(source)):
        run, _ = locate_run(source, config.run.folder, "init.from", ANY_MODEL)
        _check_same_model(config, read_run_config(run / "config.yaml").model)


def load_initial_weights(source: str, config: Config, model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Put the weights of `source` into a model that was just built: a run, a checkpoint or a Hugging Face folder.

    Errors: UserError if shape or tokenizer are others.
    """
    if isinstance(model, HuggingFaceModel) and is_huggingface_folder(Path(source)):
        _load_huggingface_weights(Path(source), model)
        return
    loaded = load_trained_model(source, runs=config.run.folder)
    _check_same_model(config, loaded.model.section)
    if loaded.tokenizer.fingerprint() != tokenizer.fingerprint():
        raise UserError(
            Problem(
                what="the weights were trained with another tokenizer",
                saw=config.tokenizer.name,
                want=f"the one beside them in {source}",
                change="tokenizer.name",
            )
        )
    model.load_state_dict(loaded.model.state_dict())


def copy_generation_config(
    source: str | None, config: Config, tokenizer: Tokenizer, say: Callable[[str], None]
) -> None:
    """Put beside the run's tokenizer how the authors of the weights sample, with all ids that begin or end a text.

    Once, by one process, when a run begins. What another tokenizer's ids mean is not known, so it is left out.
    """
    target = config.run_folder / "tokenizer" / GENERATION_CONFIG
    target.unlink(missing_ok=True)  # of an earlier start, which took other weights
    if source is None:
        return
    is_huggingface = is_huggingface_folder(Path(source))
    folder = Path(source)
    if not is_huggingface:
        run, _ = locate_run(source, config.run.folder, "init.from", ANY_MODEL)
        folder = run / "tokenizer"
    settings = read_generation_config(folder)
    companions = read_companions(folder)
    begin_id = tokenizer.token_to_id(companions.token_for_role("bos_token"))
    if begin_id is not None and is_huggingface:  # a run's weights had none, unless its own file says so
        settings.setdefault("bos_token_id", begin_id)
    end_id = tokenizer.token_to_id(companions.token_for_role("eos_token"))
    if end_id is not None:
        end_ids = list(dict.fromkeys([*eos_token_ids(settings), end_id]))
        settings["eos_token_id"] = end_ids if len(end_ids) > 1 else end_id
    if not settings:
        return
    if is_huggingface and not has_same_tokenizer(folder, tokenizer):
        say(f"{GENERATION_CONFIG} of {source} is left out: its token ids are those of another tokenizer")
        return
    files.write_json_file(target, settings)


def weight_defining_settings(section: AnyModelSection) -> dict[str, Any]:
    """The model settings that must match for weights to be loadable; the others may have changed since."""
    values = section.model_dump()
    if isinstance(section, TransformersSection):
        theirs = {f"config.{key}": value for key, value in values.pop("config").items()}
        return values | {key: value for key, value in theirs.items() if not TRAINING_ONLY_KEYS.search(key)}
    if isinstance(section, OwnModelSection):
        return {"kind": section.kind, "vocab_size": section.vocab_size}
    free = {"dropout", "attention_dropout", "initializer_range"}
    if section.positions == "rope":
        free.add("max_position_embeddings")  # no table holds them
    return {key: value for key, value in values.items() if key not in free}


def _check_same_model(config: Config, section: AnyModelSection) -> None:
    """Errors: UserError for each key by which weights of `section` would mean something else."""
    ours = weight_defining_settings(config.model)
    theirs = weight_defining_settings(section)
    problems = []
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            problem = Problem(
                what=f"the weights are of another model: {key}",
                saw=format_value(ours.get(key)),
                want=format_value(theirs.get(key)),
                change=f"model.{key} or init.from",
            )
            problems.append(problem)
    if problems:
        raise UserError(*problems)


def _load_huggingface_weights(folder: Path, model: HuggingFaceModel) -> None:
    """A Hugging Face folder's tensors into transformers' own class. Errors: UserError for those of another model."""
    weights = {f"inner.{name}": tensor for name, tensor in read_hf_weights(folder).items()}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    tied = shapes.keys() - dict(model.named_parameters()).keys()
    # A tied tensor may be written once or twice.
    wanted = {name: shape for name, shape in shapes.items() if name not in tied or name in weights}
    check_hf_tensors(wanted, weights, folder)
    model.load_state_dict(weights, strict=False)
