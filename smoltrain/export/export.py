"""A run as a Hugging Face folder, published only after `transformers` alone has given the same logits and text."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from smoltrain import __version__, files
from smoltrain.config.schema import GenerationSection, ModelSection
from smoltrain.data.tokenizers.companions import GENERATION_CONFIG, read_json_object
from smoltrain.data.tokenizers.tokenizer import TOKENIZER_FILE
from smoltrain.errors import Problem, UserError
from smoltrain.export.model_card import build_model_card
from smoltrain.export.verify import NUM_CASES, NUM_GREEDY, ExportComparison, verify_export
from smoltrain.inference.load import EXPORT_MARKER_FILE, LoadedModel, load_trained_model
from smoltrain.model import hf_format
from smoltrain.model.build import count_parameters
from smoltrain.model.hf_format import MODELING_FILE, SMOLTRAIN, make_hf_config
from smoltrain.model.transformers_model import HuggingFaceModel
from smoltrain.schedule import Plan

FORMAT = 1
MARKER_FIELDS: dict[str, Any] = {  # what must stand in a marker
    "format": int,
    "smoltrain": str,
    "run": str,
    "run_id": str,
    "step": int | None,
    "last_step": int | None,
    "files": dict,
}
SPARE_BYTES = 64 << 20  # left free beside an export


@dataclass(frozen=True)
class ExportSource:
    """What an export is of. Two exports of one run differ in the step alone."""

    run: str
    run_id: str  # of the run folder, the same as in W&B; empty for a Hugging Face folder
    step: int | None
    last_step: int | None  # of the plan

    @property
    def unfinished_label(self) -> str:
        """'unfinished: step N of M' while steps of the plan are left, else ''."""
        left = self.step is not None and self.last_step is not None and self.step < self.last_step
        return f"unfinished: step {self.step} of {self.last_step}" if left else ""


def export_model(
    source: str, out: str | Path | None = None, checkpoint: int | None = None, say: Callable[[str], None] = print
) -> Path:
    """Write the model of a run (or of a Hugging Face folder) for `transformers`; returns the folder.

    Without `out` it is RUN/export/step-N: a folder per step, so that the name says which weights it holds and no export
    is lost to the next one. The weights keep the dtype of the checkpoint.
    Errors: UserError for what `load_run` refuses and for an `out` that holds something else; TrainingStopped if
    transformers does not give the same logits and text: the folder is deleted then.
    """
    loaded = load_trained_model(source, checkpoint)
    of = identify_export_source(loaded)
    final = _resolve_export_folder(loaded, of, out)
    aside = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    _make_export_folder(aside, count_parameters(loaded.model) * loaded.dtype.itemsize)
    try:
        _write_export_files(loaded, of, aside)
        verdict = verify_export(loaded, aside)
        _write_export_marker(aside, of, verdict, loaded.tokenizer.separator)  # last: the mark of an export that passed
        _publish_export(aside, final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    say(_format_export_line(final, of, verdict, loaded.dtype))
    end, separator = loaded.tokenizer.companions.token_for_role("eos_token"), loaded.tokenizer.separator
    if end not in (None, separator):
        say(f"documents ended with {separator} in training; eos_token stays {end}, as it came")
    return final


def identify_export_source(loaded: LoadedModel) -> ExportSource:
    """The identity of a loaded model."""
    name = loaded.folder.resolve().name
    if loaded.config is None or loaded.manifest is None:
        return ExportSource(name, "", None, None)
    return ExportSource(name, loaded.manifest.wandb_id, loaded.step, Plan(loaded.config.phases).last_step)


def read_export_marker(folder: Path) -> dict[str, Any] | None:
    """What an export says of itself; None for a folder that is no verified export."""
    try:
        marker = json.loads(files.read_text_file(folder / EXPORT_MARKER_FILE))
        known = all(isinstance(marker[key], kind) for key, kind in MARKER_FIELDS.items())
        return marker if known and marker["format"] == FORMAT else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def is_verified_export(folder: Path) -> bool:
    """Whether the folder is a verified export whose files are all as they were written."""
    marker = read_export_marker(folder)
    return marker is not None and marker["files"] == _hash_export_files(folder)


def default_export_folder(run: Path, step: int) -> Path:
    """Where a run's export of a step lies unless it is told otherwise."""
    return run / "export" / f"step-{step:08d}"


def _resolve_export_folder(loaded: LoadedModel, of: ExportSource, out: str | Path | None) -> Path:
    if out is None and loaded.step is None:
        want = "a folder to write to; only runs have one of their own"
        raise UserError(Problem("nothing says where the export goes", "no OUT", want, "the OUT argument"))
    final = Path(out) if out is not None else default_export_folder(loaded.folder, loaded.step or 0)
    if final.resolve() == loaded.folder.resolve():
        raise UserError(
            Problem("the export would replace its source", str(final), "another folder", "the OUT argument")
        )
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        marker = read_export_marker(final) or {}
        if (marker.get("run"), marker.get("run_id")) != (of.run, of.run_id):
            saw = f"an export of {marker['run']}" if marker else "files that are no export"
            want = "a new or empty folder, or an earlier export of this run"
            raise UserError(Problem(f"{final} would be overwritten", saw, want, "the OUT argument"))
    return final


def _make_export_folder(aside: Path, num_bytes: int) -> None:
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            Problem("the folder cannot be made", str(error), "a place to write to", str(aside.parent))
        ) from None
    free, needed = shutil.disk_usage(aside).free, num_bytes + SPARE_BYTES
    if free < needed:
        aside.rmdir()
        saw, want = f"{free / 2**20:,.0f} MiB free", f"{needed / 2**20:,.0f} MiB"
        raise UserError(Problem("the disk is nearly full", saw, want, str(aside.parent)))


def _write_export_files(loaded: LoadedModel, of: ExportSource, folder: Path) -> None:
    """Every file but the marker."""
    section, tokenizer = loaded.model.section, loaded.tokenizer
    if isinstance(section, ModelSection):
        about = make_hf_config(section)
        ours = {name: p.detach().to(loaded.dtype) for name, p in loaded.model.named_parameters()}
        save_file(
            hf_format.convert_to_hf_tensors(section, ours), folder / "model.safetensors", metadata={"format": "pt"}
        )
        if about["architectures"] == [SMOLTRAIN]:
            shutil.copy(MODELING_FILE, folder)
    else:
        about = _save_transformers_model(loaded, folder)
    # No pad_token_id here: transformers would give that row of the embedding no gradient when the model is tuned.
    ids = {"bos_token_id": _bos_token_id(loaded), "eos_token_id": tokenizer.separator_id}
    dtype = str(loaded.dtype).removeprefix("torch.")
    about |= ids | {"dtype": dtype, "torch_dtype": dtype}  # the second word is that of transformers 4
    files.write_json_file(folder / "config.json", about)
    files.write_json_file(folder / GENERATION_CONFIG, _build_generation_config(loaded))
    tokenizer.save(folder, section.max_position_embeddings)
    if loaded.config is None:  # nothing was trained: also its way to frame a text with special tokens stays
        shutil.copy(loaded.folder / TOKENIZER_FILE, folder)
    text = build_model_card(
        loaded, about["architectures"][0], count_parameters(loaded.model), of.unfinished_label, of.last_step
    )
    files.write_text_file(folder / "README.md", text)


def _save_transformers_model(loaded: LoadedModel, folder: Path) -> dict[str, Any]:
    """Weights and config of a class of transformers, which knows best how its own are written; returns the config."""
    assert isinstance(loaded.model, HuggingFaceModel)
    inner = loaded.model.inner
    own = {name for name, _ in (*inner.named_parameters(), *inner.named_buffers())}  # a tied one once
    state = {n: x.to(loaded.dtype) if x.is_floating_point() else x for n, x in inner.state_dict().items() if n in own}
    inner.save_pretrained(folder, state_dict=state, max_shard_size="1TB")
    return {key: value for key, value in read_json_object(folder / "config.json").items() if value is not None}


def _bos_token_id(loaded: LoadedModel) -> int:
    """The id that begins a text: of the token that came in for that, else the separator."""
    named = loaded.tokenizer.token_to_id(loaded.tokenizer.companions.token_for_role("bos_token"))
    return loaded.tokenizer.separator_id if named is None else named


def _build_generation_config(loaded: LoadedModel) -> dict[str, Any]:
    """generation_config.json: the one that came with the weights, and over it what the recipe says of sampling.

    Of the ids it suppresses those that no token has. Special tokens may be drawn: one that ends a turn must be.
    """
    s, tokenizer, theirs = loaded.generation, loaded.tokenizer, dict(loaded.inherited)
    said: dict[str, Any] = {"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p}
    said["max_new_tokens"] = s.max_tokens
    # Where something came in, what the recipe leaves at its default stays as it came.
    if loaded.config is None or theirs.keys() - {"bos_token_id", "eos_token_id", "pad_token_id"}:
        default = GenerationSection()
        usual = {"temperature": default.temperature, "top_k": default.top_k, "top_p": default.top_p}
        usual["max_new_tokens"] = default.max_tokens
        said = {key: value for key, value in said.items() if value != usual[key]}
    if said.keys() - {"max_new_tokens"}:
        said["do_sample"] = s.temperature > 0
    about = theirs | said
    if about.get("do_sample") is False:  # transformers warns of settings that it does not use
        about = {key: value for key, value in about.items() if key not in ("temperature", "top_k", "top_p")}
    ends, pad = loaded.end_ids, tokenizer.token_to_id(tokenizer.pad or tokenizer.companions.token_for_role("pad_token"))
    about.setdefault("bos_token_id", _bos_token_id(loaded))
    about["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    if tokenizer.pad is not None or "pad_token_id" not in about:
        about["pad_token_id"] = tokenizer.separator_id if pad is None else pad
    return about | ({"suppress_tokens": banned} if (banned := loaded.banned_ids) else {})


def _write_export_marker(folder: Path, of: ExportSource, verdict: ExportComparison, separator: str) -> None:
    about = {
        "format": FORMAT,
        "smoltrain": __version__,
        "run": of.run,
        "run_id": of.run_id,
        "step": of.step,
        "last_step": of.last_step,
        "separator": separator,
        "class": verdict.class_name,
        "num_parameters": verdict.num_parameters,
        "max_difference": verdict.max_difference,  # of a logit, from the run's own, in fp32
        "files": _hash_export_files(folder),
    }
    files.write_json_file(folder / EXPORT_MARKER_FILE, about)


def _hash_export_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> size and SHA-256 of every file but the marker."""
    found = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != EXPORT_MARKER_FILE)
    return {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": files.file_sha256(p)} for p in found}


def _publish_export(aside: Path, final: Path) -> None:
    """Rename the export into place, the one before it out of the way."""
    before = aside.with_name(aside.name + "-before")
    if final.exists():
        final.rename(before)
    aside.rename(final)
    files.fsync_path(final.parent)
    shutil.rmtree(before, ignore_errors=True)


def _format_export_line(final: Path, of: ExportSource, verdict: ExportComparison, dtype: torch.dtype) -> str:
    kept = str(dtype).removeprefix("torch.")
    label = f" ({of.unfinished_label})" if of.unfinished_label else ""
    return (
        f"export {final}{label}: {verdict.class_name}, {verdict.num_parameters:,} parameters in {kept}; transformers "
        f"alone gives the same logits on {NUM_CASES} prompts (at most {verdict.max_difference:.1e} apart in fp32) and "
        f"the same greedy text on {NUM_GREEDY}"
    )
