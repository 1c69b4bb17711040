"""A trained model back on one process and without DeepSpeed: out of a run, a checkpoint or a Hugging Face folder."""

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from smoltrain.checkpoint import identity
from smoltrain.checkpoint.manifest import (
    WEIGHTS_FILE,
    Manifest,
    find_newest_valid_checkpoint,
    list_checkpoint_steps,
    step_folder,
    verify_checkpoint,
)
from smoltrain.config.config_file import CONFIG_FILE, find_config_damage
from smoltrain.config.load import read_run_config
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
from smoltrain.inference.generate import decode_stream, generate_ids
from smoltrain.model.build import build_model
from smoltrain.model.hf_format import Tensors, check_hf_tensors, common_dtype, read_hf_decoder, read_safetensors_file
from smoltrain.model.interface import LanguageModel

RUNS_FOLDER = Path("runs")
EXPORT_MARKER_FILE = "smoltrain.json"  # in exports that passed: what they are of, and what their files are
CHECKPOINT_FOLDER_PATTERN = re.compile(r"step-([0-9]{8,})")  # the name of a published checkpoint's folder


@dataclass(frozen=True)
class LoadedModel:
    """A model, and what goes with it wherever it came from."""

    model: LanguageModel  # fp32, in eval mode; its shape is model.section
    dtype: torch.dtype  # that the weights are stored in
    tokenizer: Tokenizer
    generation: GenerationSection
    seed: int
    folder: Path  # the run's, or the Hugging Face folder itself
    step: int | None = None  # of the checkpoint; None for a Hugging Face folder, as are the next two
    manifest: Manifest | None = None
    config: Config | None = None
    inherited: Mapping[str, Any] = field(default_factory=dict)  # generation_config.json that came with the weights

    def text(
        self,
        prompt: str,
        settings: GenerationSection,
        *,
        greedy: bool,
        seed: int,
        say: Callable[[str], None] = lambda _: None,
    ) -> Iterator[str]:
        """Pieces of the text behind a prompt, as they come; an empty prompt begins a document.

        The prompt is text, also where it spells a special token. Errors: UserError, at once, for a prompt that is no
        text or too long; and those of `generate`.
        """
        if any("\ud800" <= character <= "\udfff" for character in prompt):  # how Python reads bytes that are no UTF-8
            raise UserError(Problem("the prompt is not text", format_value(prompt), "text in UTF-8", "the prompt"))
        ids = self.tokenizer.encode(prompt) or [self.tokenizer.separator_id]
        new = self.generate(ids, settings, greedy=greedy, seed=seed, say=say)
        return decode_stream(ids, new, self.tokenizer.decode)

    def generate(self, ids: list[int], settings: GenerationSection, **options: Any) -> Iterator[int]:
        """What the model writes behind ids, up to any end of the text. Options and errors: those of `generate`."""
        return generate_ids(self.model, ids, settings, stop_ids=self.end_ids, banned_ids=self.banned_ids, **options)

    @property
    def end_ids(self) -> list[int]:
        """Ids that end a text: the separator, and those that its authors named, as the end of a turn in a chat."""
        return stop_token_ids(self.tokenizer, self.inherited)

    @property
    def banned_ids(self) -> list[int]:
        """Ids that are never drawn: rows of the table without a token, and those that its authors suppress."""
        size = self.model.section.vocab_size
        theirs = {i for i in suppressed_token_ids(self.inherited) if i < size}
        return sorted(theirs.union(self.tokenizer.unused_ids(size)))


def load_trained_model(source: str, step: int | None = None, runs: Path = RUNS_FOLDER) -> LoadedModel:
    """The model of a run's newest valid checkpoint, or of that of `step`; or that of a Hugging Face folder.

    `source` is a folder, or the name of a run under `runs`; the folder of a checkpoint is that run with its step.
    Errors: UserError for a folder that is neither, a step that has no checkpoint, a checkpoint that does not verify, a
    class that the decoder cannot be (huggingface.SUPPORTED), and files that do not fit each other.
    """
    if is_huggingface_folder(Path(source)):
        if step is not None:
            raise UserError(
                Problem("this folder has no checkpoints", str(step), "a run for --checkpoint", "--checkpoint")
            )
        return _load_huggingface_folder(Path(source))
    folder, named = locate_run(source, runs)
    settings = read_run_config(folder / "config.yaml")
    change = "the RUN argument" if step is None else "--checkpoint"
    manifest = find_valid_manifest(folder, named if step is None else step, change, _print_warning)
    path = folder / CONFIG_FILE
    identity.check_checkpoint_identity(manifest, identity.read_run_identity(path), path)
    if damage := find_config_damage(folder):
        _print_warning(f"WARNING: {damage}")
    # Compared first with a model that takes no memory: a config that is not theirs may ask for any amount of it.
    bare = build_model(settings.model, device="meta")
    weights = read_checkpoint_weights(step_folder(folder / "checkpoints", manifest.step), bare)
    built = build_model(settings.model)
    built.load_state_dict({name: x.float() for name, x in weights.items()}, strict=False)
    wants = settings.tokenizer
    tokenizer = Tokenizer.from_folder(folder / "tokenizer", wants.separator, wants.pad)
    _check_vocabulary_size(tokenizer, built, folder / "tokenizer")
    dtype = common_dtype(weights.values())
    seed = settings.run.seed
    return LoadedModel(
        built.eval(), dtype, tokenizer, settings.generation, seed, folder, manifest.step, manifest, settings,
        read_generation_config(folder / "tokenizer"),
    )  # fmt: skip


def stop_token_ids(tokenizer: Tokenizer, inherited: Mapping[str, Any]) -> list[int]:
    """The separator, and what a generation_config.json names as the end of a text."""
    theirs = [i for i in eos_token_ids(inherited) if i < tokenizer.num_ids]
    return theirs if tokenizer.separator_id in theirs else [tokenizer.separator_id, *theirs]


def is_huggingface_folder(folder: Path) -> bool:
    """Whether the folder is one of transformers' and no run."""
    return (folder / "config.json").is_file() and not (folder / "config.yaml").is_file()


def find_run_folder(run: str, runs: Path = RUNS_FOLDER, change: str = "the RUN argument") -> Path:
    """The folder of a run, which is named by its path or by its name under `runs`. Errors: UserError if it is none."""
    folder, step = locate_run(run, runs, change)
    if step is not None:
        raise UserError(Problem("this is one checkpoint of a run", repr(run), f"the run, {folder}", change))
    return folder


def locate_run(source: str, runs: Path = RUNS_FOLDER, change: str = "the RUN argument") -> tuple[Path, int | None]:
    """The folder of a run; and, where `source` is the folder of one of its checkpoints, the step of that.

    The checkpoint itself need not be there. Errors: UserError if there is no such run.
    """
    for folder in (Path(source), runs / source):
        if (folder / "config.yaml").is_file():
            return folder, None
        for path in (folder, folder.resolve()):  # as it was named, if that says enough
            named, run = CHECKPOINT_FOLDER_PATTERN.fullmatch(path.name), path.parent.parent
            if named and path.parent.name == "checkpoints" and (run / "config.yaml").is_file():
                return run, int(named[1])
    have = ", ".join(sorted(p.parent.name for p in runs.glob("*/config.yaml"))) or "none yet"
    want = f"the folder of a run or of its checkpoint, a name under {runs}/ ({have}), or a Hugging Face folder"
    raise UserError(Problem("no such run", repr(source), want, change))


def find_valid_manifest(run: Path, step: int | None, change: str, say: Callable[[str], None]) -> Manifest:
    """The manifest of a run's checkpoint of this step, or of its newest one that verifies.

    Errors: UserError if there is none.
    """
    if step is None:
        found = find_newest_valid_checkpoint(run / "checkpoints", say)
        if found is None:
            raise UserError(Problem("this run has no checkpoint yet", str(run), "at least one", change))
        return found
    manifest = verify_checkpoint(find_checkpoint_folder(run, step, change))
    if isinstance(manifest, str):
        raise UserError(Problem("the checkpoint is not whole", manifest, "the file as it was written", change))
    return manifest


def find_checkpoint_folder(run: Path, step: int, change: str) -> Path:
    """The folder of a run's checkpoint of this step, unread. Errors: UserError if there is none."""
    checkpoints = run / "checkpoints"
    if step not in (have := list_checkpoint_steps(checkpoints)):
        want = f"one of {', '.join(map(str, have))}" if have else "a run that has saved one"
        raise UserError(Problem("no checkpoint of this step", str(step), want, change))
    return step_folder(checkpoints, step)


def _print_warning(text: str) -> None:
    print(text, file=sys.stderr)


def read_checkpoint_weights(folder: Path, built: LanguageModel) -> Tensors:
    """The weights in a checkpoint, in the dtype it stores. Errors: UserError where they are not those of the model."""
    path = folder / WEIGHTS_FILE
    weights = read_safetensors_file(path)
    own = dict(built.named_parameters())  # a tied one once, as the checkpoint has it
    check_hf_tensors({name: p.shape for name, p in own.items()}, weights, path)
    return weights


def _load_huggingface_folder(folder: Path) -> LoadedModel:
    section, weights = read_hf_decoder(folder)
    built = build_model(section)
    built.load_state_dict({name: x.float() for name, x in weights.items()})
    if not (folder / TOKENIZER_FILE).is_file():
        raise UserError(
            Problem("the folder has no tokenizer", f"no {TOKENIZER_FILE}", "the tokenizer's own file", str(folder))
        )
    inherited = read_generation_config(folder)
    tokenizer = Tokenizer.from_folder(folder, _find_separator(folder, inherited))
    _check_vocabulary_size(tokenizer, built, folder / TOKENIZER_FILE)
    dtype = common_dtype(weights.values())
    settings = _read_generation_settings(inherited, folder / GENERATION_CONFIG)
    return LoadedModel(built.eval(), dtype, tokenizer, settings, RunSection().seed, folder, inherited=inherited)


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
    marker = read_json_object(folder / EXPORT_MARKER_FILE) if (folder / EXPORT_MARKER_FILE).is_file() else {}
    if isinstance(marker.get("separator"), str):
        return marker["separator"]
    ids = eos_token_ids(inherited)
    end = read_companions(folder).token_for_role("eos_token")
    if end is None and not ids:
        saw = f"no eos_token in {TOKENIZER_CONFIG} or {SPECIAL_TOKENS_MAP}, no eos_token_id in config.json"
        raise UserError(Problem("nothing says which token ends a text", saw, "one of these", str(folder)))
    return ids[0] if end is None else end


def _read_generation_settings(about: Mapping[str, Any], file: Path) -> GenerationSection:
    """The sampling settings of generation_config.json, where it says whether it samples; else the defaults."""
    names = {"max_tokens": "max_new_tokens", "temperature": "temperature", "top_k": "top_k", "top_p": "top_p"}
    match about.get("do_sample"):
        case None:
            return GenerationSection()
        case False:
            names, about = {"max_tokens": "max_new_tokens", "temperature": "temperature"}, {**about, "temperature": 0}
    try:
        return GenerationSection(**{ours: about[name] for ours, name in names.items() if about.get(name) is not None})
    except ValidationError as error:
        raise UserError(
            *[problem_from_pydantic(names[str(e["loc"][0])], e, str(file)) for e in error.errors()]
        ) from None


def _check_vocabulary_size(tokenizer: Tokenizer, built: LanguageModel, where: Path) -> None:
    """Errors: UserError if the tokenizer can give an id that the embedding table has no row for."""
    if tokenizer.num_ids > built.section.vocab_size:
        want = f"at most the model's {built.section.vocab_size:,}"
        raise UserError(
            Problem("the tokenizer has more ids than the model", f"{tokenizer.num_ids:,}", want, str(where))
        )
