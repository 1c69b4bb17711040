"""A run as a Hugging Face folder, published only after `transformers` alone has given the same logits and text."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from smoltrain import files
from smoltrain.checkpoint.manifest import MANIFEST_FILE, step_folder
from smoltrain.config.load import override_export
from smoltrain.config.schema import ExportSection, GenerationSection, ModelSection
from smoltrain.data.tokenizers.companions import GENERATION_CONFIG, read_json_object
from smoltrain.data.tokenizers.tokenizer import TOKENIZER_FILE
from smoltrain.errors import Problem, TrainingStopped, UserError
from smoltrain.export.marker import ExportSource, default_export_folder, read_export_marker, write_export_marker
from smoltrain.export.model_card import CURVE_FILE, build_model_card
from smoltrain.export.verify import NUM_CASES, NUM_GREEDY, ExportComparison, verify_export
from smoltrain.inference.load import GENERATION_KEYS, LoadedModel, load_trained_model
from smoltrain.model import hf_config, hf_format
from smoltrain.model.build import count_parameters
from smoltrain.model.hf_weights import write_safetensors_file
from smoltrain.model.transformers_model import HuggingFaceModel
from smoltrain.schedule import Plan

SPARE_BYTES = 64 << 20  # left free beside an export
TOKEN_ID_KEYS = {"bos_token_id", "eos_token_id", "pad_token_id"}


def export_model(
    run: str, out: str | Path | None = None, checkpoint: int | None = None, say: Callable[[str], None] = print,
    about: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Write the model of a run (or of a Hugging Face folder) for `transformers`; returns the folder.

    Without `out` it is RUN/export/step-N: a folder per step, so that the name says which weights it holds and no export
    is lost to the next one. The weights keep the dtype of the checkpoint. `about` takes the place of keys of the
    recipe's section `export`, which the model card tells.
    Errors: UserError for what `load_trained_model` refuses and for an `out` that holds something else; TrainingStopped
    if transformers does not give the same logits and text: the folder is deleted then.
    """
    loaded = load_trained_model(run, checkpoint)
    source = identify_export_source(loaded)
    told = override_export(ExportSection() if loaded.config is None else loaded.config.export, about or {})
    final = _resolve_export_folder(loaded, source, out)
    aside = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    _make_export_folder(aside, count_parameters(loaded.model) * loaded.dtype.itemsize)
    try:
        _write_export_files(loaded, source, told, aside)
        comparison = verify_export(loaded, aside)
        write_export_marker(aside, source, comparison, loaded.tokenizer.separator)  # last: it passed
        _publish_export(aside, final)
    except TrainingStopped as error:
        raise TrainingStopped(f"{error}; the folder was deleted") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    say(_format_export_line(final, source, comparison, loaded.dtype_name))
    separator = loaded.tokenizer.separator
    if _replaced_bos_token(loaded) is not None:
        say(f"documents began behind {separator} in training, so it is the bos_token")
    eos_token = loaded.tokenizer.companions.token_for_role("eos_token")
    if eos_token not in (None, separator):
        say(f"documents ended with {separator} in training; eos_token stays {eos_token}, as it came")
    return final


def identify_export_source(loaded: LoadedModel) -> ExportSource:
    """The run, step and last step of a loaded model."""
    name = loaded.folder.resolve().name
    if loaded.config is None or loaded.manifest is None:
        return ExportSource(name, "", None, None)
    return ExportSource(name, loaded.manifest.wandb_id, loaded.step, Plan(loaded.config.phases).last_step)


def _resolve_export_folder(loaded: LoadedModel, source: ExportSource, out: str | Path | None) -> Path:
    """Where the export goes. Errors: UserError where it would have no place, or take that of something else."""
    change = "the OUT argument"
    if out is not None:
        final = Path(out)
    elif loaded.step is not None:
        final = default_export_folder(loaded.folder, loaded.step)
    else:
        want = "a folder to write to; only runs have one of their own"
        raise UserError(Problem("nothing says where the export goes", "no OUT", want, change))
    home = loaded.folder.resolve()
    if Path.cwd().is_relative_to(final.resolve()):  # it is renamed into place, so a folder above would leave with it
        want = "a folder to be made, as ./model"
        raise UserError(Problem("the export would replace the folder that you are in", str(final), want, change))
    if final.resolve() == home:
        raise UserError(Problem("the export would replace its source", str(final), "another folder", change))
    is_empty_folder = final.is_dir() and not any(final.iterdir())
    if final.exists() and not is_empty_folder:
        marker = read_export_marker(final)
        if marker is None or not _is_export_of(marker, source, is_within=final.resolve().is_relative_to(home)):
            saw = "files that are no export" if marker is None else f"an export of {marker['run']}"
            want = "a new or empty folder, or an earlier export of this run"
            raise UserError(Problem(f"{final} would be overwritten", saw, want, change))
    return final


def _is_export_of(marker: dict[str, Any], source: ExportSource, *, is_within: bool) -> bool:
    """Whether a marker is one of this source; within a run's own folder by the run's id alone.

    A folder that was copied or renamed holds exports under its name of before.
    """
    is_same_run = marker["run_id"] == source.run_id
    return is_same_run and (marker["run"] == source.run or (is_within and bool(source.run_id)))


def _make_export_folder(aside: Path, num_bytes: int) -> None:
    """Errors: UserError where it cannot be made, or where the disk has no room for so many bytes."""
    where = str(aside.parent)
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise UserError(Problem("the folder cannot be made", str(error), "a place to write to", where)) from None
    free = shutil.disk_usage(aside).free
    needed = num_bytes + SPARE_BYTES
    if free < needed:
        aside.rmdir()
        want = f"{needed / 2**20:,.0f} MiB"
        raise UserError(Problem("not enough disk space for the export", f"{free / 2**20:,.0f} MiB free", want, where))


def _write_export_files(loaded: LoadedModel, source: ExportSource, about: ExportSection, folder: Path) -> None:
    """Every file but the marker."""
    section = loaded.model.section
    tokenizer = loaded.tokenizer
    if isinstance(section, ModelSection):
        config = _save_decoder(loaded, section, folder)
    else:
        config = _save_transformers_model(loaded, folder)
    # No pad_token_id here: transformers would give that row of the embedding no gradient when the model is tuned.
    config |= {"bos_token_id": _bos_token_id(loaded), "eos_token_id": tokenizer.separator_id}
    config |= {"dtype": loaded.dtype_name, "torch_dtype": loaded.dtype_name}  # the second is transformers 4's word
    files.write_json_file(folder / "config.json", config)
    files.write_json_file(folder / GENERATION_CONFIG, _build_generation_config(loaded))
    tokenizer.save(folder, section.max_position_embeddings, _replaced_bos_token(loaded))
    if loaded.config is None:  # nothing was trained: also its way to frame a text with special tokens stays
        shutil.copy(loaded.folder / TOKENIZER_FILE, folder)
    has_curve = _copy_curve(loaded, folder)
    files.write_text_file(folder / "README.md", build_model_card(loaded, config, source, about, has_curve=has_curve))


def _copy_curve(loaded: LoadedModel, folder: Path) -> bool:
    """Put the loss curve beside the card, if it was drawn since the exported checkpoint was saved."""
    curve = loaded.folder / "plots" / CURVE_FILE
    if loaded.step is None or not curve.is_file():
        return False
    saved = step_folder(loaded.folder / "checkpoints", loaded.step) / MANIFEST_FILE
    if curve.stat().st_mtime < saved.stat().st_mtime:
        return False
    shutil.copyfile(curve, folder / CURVE_FILE)
    return True


def _save_decoder(loaded: LoadedModel, section: ModelSection, folder: Path) -> dict[str, Any]:
    """The weights of our own decoder as those of a class of transformers; returns the config."""
    config = hf_config.make_hf_config(section)
    ours = {name: p.detach().to(loaded.dtype) for name, p in loaded.model.named_parameters()}
    theirs = hf_format.convert_to_hf_tensors(section, ours)
    write_safetensors_file(folder / "model.safetensors", theirs)
    if config["architectures"] == [hf_config.SMOLTRAIN]:
        shutil.copy(hf_config.MODELING_FILE, folder)
    return config


def _save_transformers_model(loaded: LoadedModel, folder: Path) -> dict[str, Any]:
    """Weights and config of a class of transformers, which knows best how its own are written; returns the config."""
    assert isinstance(loaded.model, HuggingFaceModel)
    inner = loaded.model.inner
    own = {name for name, _ in (*inner.named_parameters(), *inner.named_buffers())}  # a tied one once
    state = {name: x for name, x in inner.state_dict().items() if name in own}
    for name, x in state.items():
        if x.is_floating_point():
            state[name] = x.to(loaded.dtype)
    inner.save_pretrained(folder, state_dict=state, max_shard_size="1TB")
    files.give_default_mode(folder / "model.safetensors")
    config = read_json_object(folder / "config.json")
    return {key: value for key, value in config.items() if value is not None}


def _bos_token_id(loaded: LoadedModel) -> int:
    """The id that begins a text: what came with the weights says it.

    Of weights that were trained from scratch it is the separator, whatever the tokenizer calls its bos_token: each
    document of their rows began behind it, and none behind another.
    """
    tokenizer = loaded.tokenizer
    if loaded.config is None:
        own = tokenizer.token_to_id(tokenizer.companions.token_for_role("bos_token"))
        return tokenizer.separator_id if own is None else own
    theirs = loaded.inherited_generation.get("bos_token_id")
    if type(theirs) is int and 0 <= theirs < tokenizer.num_ids:
        return theirs
    return tokenizer.separator_id


def _replaced_bos_token(loaded: LoadedModel) -> str | None:
    """The separator, where the tokenizer would name another token as what begins a text; None where it need not.

    Programs take bos_token for it, and eos_token where there is none, as lm_eval does before a text's first token.
    """
    tokenizer = loaded.tokenizer
    if loaded.config is None or _bos_token_id(loaded) != tokenizer.separator_id:
        return None
    companions = tokenizer.companions
    begin = companions.token_for_role("bos_token") or companions.token_for_role("eos_token") or tokenizer.separator
    return None if begin == tokenizer.separator else tokenizer.separator


def _build_generation_config(loaded: LoadedModel) -> dict[str, Any]:
    """generation_config.json: the one that came with the weights, and over it what the recipe says of sampling.

    Of the ids it suppresses those that no token has. Special tokens may be drawn: one that ends a turn must be.
    """
    config = dict(loaded.inherited_generation)
    recipe = {theirs: getattr(loaded.generation, ours) for ours, theirs in GENERATION_KEYS.items()}
    if loaded.config is None or config.keys() - TOKEN_ID_KEYS:
        # Something came in: what the recipe leaves at its default stays as it came.
        for ours, theirs in GENERATION_KEYS.items():
            if recipe[theirs] == getattr(GenerationSection(), ours):
                del recipe[theirs]
    if recipe.keys() - {"max_new_tokens"}:
        recipe["do_sample"] = loaded.generation.temperature > 0
    config |= recipe
    if config.get("do_sample") is False:  # transformers warns of settings that it does not use
        for key in ("temperature", "top_k", "top_p"):
            config.pop(key, None)

    tokenizer = loaded.tokenizer
    config.setdefault("bos_token_id", _bos_token_id(loaded))
    config["eos_token_id"] = loaded.stop_ids if len(loaded.stop_ids) > 1 else loaded.stop_ids[0]
    if tokenizer.pad is not None or "pad_token_id" not in config:
        pad = tokenizer.token_to_id(tokenizer.pad or tokenizer.companions.token_for_role("pad_token"))
        config["pad_token_id"] = tokenizer.separator_id if pad is None else pad
    if loaded.banned_ids:
        config["suppress_tokens"] = loaded.banned_ids
    return config


def _publish_export(aside: Path, final: Path) -> None:
    """Rename the export into place, the one before it out of the way."""
    before = aside.with_name(aside.name + "-before")
    if final.exists():
        final.rename(before)
    aside.rename(final)
    files.fsync_path(final.parent)
    shutil.rmtree(before, ignore_errors=True)


def _format_export_line(final: Path, source: ExportSource, comparison: ExportComparison, dtype_name: str) -> str:
    label = "" if source.unfinished_label is None else f" ({source.unfinished_label})"
    where = "" if comparison.device_reason is None else f"; the comparison {comparison.device_reason}"
    return (
        f"export {final}{label}: {comparison.class_name}, {comparison.num_parameters:,} parameters in {dtype_name}; "
        f"transformers alone gives the same logits on {NUM_CASES} prompts (at most {comparison.max_difference:.1e} "
        f"apart in fp32) and the same greedy text on {NUM_GREEDY}{where}"
    )
