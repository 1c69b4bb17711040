"""A trained model back on one process and without DeepSpeed: out of a run, a checkpoint or a Hugging Face folder."""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from smoltrain.checkpoint import identity
from smoltrain.checkpoint.manifest import WEIGHTS_FILE, Manifest, step_folder
from smoltrain.config.config_file import CONFIG_FILE, RUNS_FOLDER, find_config_damage, read_provenance
from smoltrain.config.schema import Config, GenerationSection, RunSection
from smoltrain.data.tokenizers.companions import (
    GENERATION_CONFIG,
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    eos_token_ids,
    read_companions,
    read_generation_config,
    read_json_object,
    suppressed_token_ids,
)
from smoltrain.data.tokenizers.tokenizer import TOKENIZER_FILE, Tokenizer
from smoltrain.errors import Problem, UserError, format_value, problem_from_pydantic
from smoltrain.files import print_warning
from smoltrain.inference.find_run import (
    ANY_MODEL,
    EXPORT_MARKER_FILE,
    find_valid_manifest,
    is_huggingface_folder,
    locate_run,
    read_relocated_config,
)
from smoltrain.inference.generate import decode_stream, generate_ids
from smoltrain.model.build import build_model
from smoltrain.model.hf_format import read_hf_decoder
from smoltrain.model.hf_weights import Tensors, check_hf_tensors, common_dtype, read_safetensors_file
from smoltrain.model.interface import LanguageModel

# Our generation section -> the keys of a generation_config.json.
GENERATION_KEYS = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "max_tokens": "max_new_tokens"}


@dataclass(frozen=True)
class LoadedModel:
    """A model that can write, and what goes with it wherever it came from."""

    model: LanguageModel  # fp32, in eval mode; its shape is model.section
    dtype: torch.dtype  # that the weights are stored in
    tokenizer: Tokenizer
    generation: GenerationSection
    seed: int
    folder: Path  # the run's, or the Hugging Face folder itself
    step: int | None = None  # of the checkpoint; None for a Hugging Face folder, as are the next two
    manifest: Manifest | None = None
    config: Config | None = None  # whose run.folder is where the run lies now
    inherited_generation: Mapping[str, Any] = field(default_factory=dict)  # generation_config.json beside the weights

    def generate_text(
        self, prompt: str, settings: GenerationSection, *, greedy: bool, seed: int,
        say: Callable[[str], None] = lambda _: None,
    ) -> Iterator[str]:  # fmt: skip
        """Pieces of the text behind a prompt, as they come; an empty prompt begins a document.

        The prompt is text, also where it spells a special token. Errors: UserError, at once, for a prompt that is no
        text or too long; and those of `generate_ids`.
        """
        check_prompt_is_text(prompt)
        ids = self.tokenizer.encode(prompt) or [self.tokenizer.separator_id]
        new_ids = self.generate_ids(ids, settings, greedy=greedy, seed=seed, say=say)
        return decode_stream(ids, new_ids, self.tokenizer.decode)

    def generate_ids(self, ids: list[int], settings: GenerationSection, **options: Any) -> Iterator[int]:
        """What the model writes behind ids, up to any of `stop_ids`. Options and errors: see generate.generate_ids."""
        return generate_ids(self.model, ids, settings, stop_ids=self.stop_ids, banned_ids=self.banned_ids, **options)

    @property
    def dtype_name(self) -> str:
        """The dtype of the weights without "torch.", as bfloat16."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end a text: the separator, and those that its authors named, as the end of a turn in a chat."""
        return stop_token_ids(self.tokenizer, self.inherited_generation)

    @property
    def banned_ids(self) -> list[int]:
        """Ids that are never drawn: rows of the table without a token, and those that its authors suppress."""
        size = self.model.section.vocab_size
        theirs = {i for i in suppressed_token_ids(self.inherited_generation) if i < size}
        return sorted(theirs.union(self.tokenizer.unused_ids(size)))


def check_prompt_is_text(prompt: str) -> None:
    """Errors: UserError for a prompt with surrogates, which is how Python reads bytes that are no UTF-8; for no str."""
    if not isinstance(prompt, str) or any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UserError(Problem("the prompt is not text", format_value(prompt), "text in UTF-8", "the prompt"))


def load_trained_model(source: str, step: int | None = None, runs: Path = RUNS_FOLDER) -> LoadedModel:
    """The model of a run's newest valid checkpoint, or of that of `step`; or that of a Hugging Face folder.

    `source` is a folder, or the name of a run under `runs`; the folder of a checkpoint is that run with its step.
    Errors: UserError for a folder that is neither, a step that has no checkpoint, a checkpoint that does not verify, a
    class that the decoder cannot be (hf_config.SUPPORTED), and files that do not fit each other.
    """
    if not is_huggingface_folder(Path(source)):
        return _load_run(source, step, runs)
    if step is not None:
        change = "--checkpoint"
        raise UserError(Problem("this folder has no checkpoints", str(step), f"a run for {change}", change))
    return _load_huggingface_folder(Path(source))


def _load_run(source: str, step: int | None, runs: Path) -> LoadedModel:
    folder, step_of_source = locate_run(source, runs, kinds=ANY_MODEL)
    change = "the RUN argument" if step is None else "--checkpoint"
    config_file = folder / CONFIG_FILE
    config = read_relocated_config(folder)
    manifest = find_valid_manifest(folder, step_of_source if step is None else step, change, _print_to_stderr)
    own = identity.identity_of_run(config, read_provenance(config_file))
    identity.check_checkpoint_identity(manifest.identity, manifest.step, own, config_file)
    damage = find_config_damage(folder)
    if damage:
        print_warning(damage)
    # Compared first with a model that takes no memory: a config that is not theirs may ask for any amount of it.
    bare = build_model(config.model, device="meta")
    weights = read_checkpoint_weights(step_folder(folder / "checkpoints", manifest.step), bare)
    model = build_model(config.model)
    model.load_state_dict({name: x.float() for name, x in weights.items()}, strict=False)  # a tied weight is there once
    tokenizer = Tokenizer.from_folder(folder / "tokenizer", config.tokenizer.separator, config.tokenizer.pad)
    _check_vocabulary_size(tokenizer, model, folder / "tokenizer")
    return LoadedModel(
        model=model.eval(), dtype=common_dtype(weights.values()), tokenizer=tokenizer,
        generation=config.generation, seed=config.run.seed, folder=folder, step=manifest.step, manifest=manifest,
        config=config, inherited_generation=read_generation_config(folder / "tokenizer"),
    )  # fmt: skip


def _load_huggingface_folder(folder: Path) -> LoadedModel:
    section, weights = read_hf_decoder(folder)
    model = build_model(section)
    model.load_state_dict({name: x.float() for name, x in weights.items()})
    if not (folder / TOKENIZER_FILE).is_file():
        want = "the tokenizer's own file"
        raise UserError(Problem("the folder has no tokenizer", f"no {TOKENIZER_FILE}", want, str(folder)))
    inherited = read_generation_config(folder)
    tokenizer = Tokenizer.from_folder(folder, _find_separator(folder, inherited))
    _check_vocabulary_size(tokenizer, model, folder / TOKENIZER_FILE)
    if tokenizer.dropped_frame:
        frame = ", ".join(tokenizer.dropped_frame)
        _print_to_stderr(f"{folder}: its tokenizer adds {frame} to a text, which is left out here as in training here")
    return LoadedModel(
        model=model.eval(), dtype=common_dtype(weights.values()), tokenizer=tokenizer,
        generation=_read_generation_settings(inherited, folder / GENERATION_CONFIG), seed=RunSection().seed,
        folder=folder, inherited_generation=inherited,
    )  # fmt: skip


def stop_token_ids(tokenizer: Tokenizer, inherited: Mapping[str, Any]) -> list[int]:
    """The separator, and what a generation_config.json names as the end of a text."""
    theirs = [i for i in eos_token_ids(inherited) if i < tokenizer.num_ids]
    return theirs if tokenizer.separator_id in theirs else [tokenizer.separator_id, *theirs]


def _print_to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


def read_checkpoint_weights(folder: Path, model: LanguageModel) -> Tensors:
    """The weights in a checkpoint, in the dtype it stores. Errors: UserError where they are not those of the model."""
    path = folder / WEIGHTS_FILE
    weights = read_safetensors_file(path)
    wanted = {name: p.shape for name, p in model.named_parameters()}  # a tied one once, as the checkpoint has it
    check_hf_tensors(wanted, weights, path)
    return weights


def has_same_tokenizer(folder: Path, tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer of a Hugging Face folder is this one."""
    try:
        theirs = Tokenizer.from_folder(folder, _find_separator(folder, read_generation_config(folder)))
    except UserError:  # it has none, or none that can be read
        return False
    return theirs.fingerprint() == tokenizer.fingerprint()


def _find_separator(folder: Path, inherited: Mapping[str, Any]) -> str | int:
    """The token that ends a text, or its id.

    The tokenizer's files name it, or those of the model: published folders differ in this. An export says which one
    was between its documents.
    """
    marker_file = folder / EXPORT_MARKER_FILE
    if marker_file.is_file():
        separator = read_json_object(marker_file).get("separator")
        if isinstance(separator, str):
            return separator
    eos_token = read_companions(folder).token_for_role("eos_token")
    if eos_token is not None:
        return eos_token
    eos_ids = eos_token_ids(inherited)
    if not eos_ids:
        saw = f"no eos_token in {TOKENIZER_CONFIG} or {SPECIAL_TOKENS_MAP}, no eos_token_id in config.json"
        raise UserError(Problem("nothing says which token ends a text", saw, "one of these", str(folder)))
    return eos_ids[0]


def _read_generation_settings(about: Mapping[str, Any], file: Path) -> GenerationSection:
    """The sampling settings of generation_config.json, where it says whether it samples; else the defaults."""
    do_sample = about.get("do_sample")
    if do_sample is None:
        return GenerationSection()
    values = {ours: about[theirs] for ours, theirs in GENERATION_KEYS.items() if about.get(theirs) is not None}
    if do_sample is False:  # greedy, whatever else stands there
        values.pop("top_k", None)
        values.pop("top_p", None)
        values["temperature"] = 0
    try:
        return GenerationSection(**values)
    except ValidationError as error:
        problems = [problem_from_pydantic(GENERATION_KEYS[str(e["loc"][0])], e, str(file)) for e in error.errors()]
        raise UserError(*problems) from None


def _check_vocabulary_size(tokenizer: Tokenizer, model: LanguageModel, where: Path) -> None:
    """Errors: UserError if the tokenizer can give an id that the embedding table has no row for."""
    if tokenizer.num_ids > model.section.vocab_size:
        what = "the tokenizer has more ids than the model"
        want = f"at most the model's {model.section.vocab_size:,}"
        raise UserError(Problem(what, f"{tokenizer.num_ids:,}", want, str(where)))
