"""A trained model back on one process and without DeepSpeed: out of a run folder, or out of a Hugging Face folder."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError

from smoltrain import checkpoint, config, huggingface, model
from smoltrain.data.tokenizer import FILE, Tokenizer
from smoltrain.errors import Problem, UserError, invalid
from smoltrain.generate import generate, spoken
from smoltrain.model import LanguageModel
from smoltrain.schema import Config, GenerationSection, RunSection

RUNS = Path("runs")


@dataclass(frozen=True)
class LoadedRun:
    """A model, and what goes with it wherever it came from."""

    model: LanguageModel  # fp32, in eval mode; its shape is model.section
    dtype: torch.dtype  # that the weights are stored in
    tokenizer: Tokenizer
    generation: GenerationSection
    seed: int
    folder: Path  # the run's, or the Hugging Face folder itself
    step: int | None = None  # of the checkpoint; None for a Hugging Face folder, as are the next two
    manifest: checkpoint.Manifest | None = None
    config: Config | None = None

    def text(self, prompt: str, settings: GenerationSection, *, greedy: bool, seed: int) -> Iterator[str]:
        """Pieces of the text behind a prompt, as they come; an empty prompt begins a document.

        Errors: UserError, at once, for a prompt that is too long.
        """
        ids = self.tokenizer.encode(prompt) or [self.tokenizer.separator_id]
        banned = self.tokenizer.unspoken_ids(self.model.section.vocab_size)
        stop = self.tokenizer.separator_id
        new = generate(self.model, ids, settings, stop_id=stop, banned_ids=banned, greedy=greedy, seed=seed)
        return spoken(ids, new, self.tokenizer.decode)


def load_run(source: str, step: int | None = None, runs: Path = RUNS) -> LoadedRun:
    """The model of a run's newest valid checkpoint, or of that of `step`; or that of a Hugging Face folder.

    `source` is a folder, or the name of a run under `runs`.
    Errors: UserError for a folder that is neither, a step that has no checkpoint, a checkpoint that does not verify, a
    class that the decoder cannot be (huggingface.SUPPORTED), and files that do not fit each other.
    """
    if is_huggingface(Path(source)):
        if step is not None:
            raise UserError(
                Problem("this folder has no checkpoints", str(step), "a run for --checkpoint", "--checkpoint")
            )
        return _from_huggingface(Path(source))
    folder = run_folder(source, runs)
    settings = config.read(folder / "config.yaml")
    manifest = _manifest(folder / "checkpoints", step)
    built = model.build(settings.model)
    path = checkpoint.folder_of(folder / "checkpoints", manifest.step) / "model.safetensors"
    weights = huggingface.read_safetensors(path)
    own = dict(built.named_parameters())  # a tied one once, as the checkpoint has it
    huggingface.check_tensors({name: p.shape for name, p in own.items()}, weights, path)
    built.load_state_dict({name: x.float() for name, x in weights.items()}, strict=False)
    wants = settings.tokenizer
    tokenizer = Tokenizer.from_folder(folder / "tokenizer", wants.separator, wants.pad)
    _check_ids(tokenizer, built, folder / "tokenizer")
    dtype = huggingface.stored_dtype(weights.values())
    seed = settings.run.seed
    return LoadedRun(
        built.eval(), dtype, tokenizer, settings.generation, seed, folder, manifest.step, manifest, settings
    )


def is_huggingface(folder: Path) -> bool:
    """Whether the folder is one of transformers' and no run."""
    return (folder / "config.json").is_file() and not (folder / "config.yaml").is_file()


def run_folder(run: str, runs: Path = RUNS, change: str = "the RUN argument") -> Path:
    """The folder of a run, which is named by its path or by its name under `runs`. Errors: UserError if it is none."""
    for folder in (Path(run), runs / run):
        if (folder / "config.yaml").is_file():
            return folder
    have = ", ".join(sorted(p.parent.name for p in runs.glob("*/config.yaml"))) or "none yet"
    want = f"a run folder, a name under {runs}/ ({have}), or a Hugging Face folder"
    raise UserError(Problem("no such run", repr(run), want, change))


def _manifest(checkpoints: Path, step: int | None) -> checkpoint.Manifest:
    if step is None:
        found = checkpoint.newest_valid(checkpoints, lambda text: print(text, file=sys.stderr))
        if found is None:
            raise UserError(
                Problem("this run has no checkpoint yet", str(checkpoints), "at least one", "the RUN argument")
            )
        return found
    if step not in checkpoint.steps(checkpoints):
        have = ", ".join(map(str, checkpoint.steps(checkpoints))) or "none"
        raise UserError(Problem("no checkpoint of this step", str(step), f"one of {have}", "--checkpoint"))
    manifest = checkpoint.verify(checkpoint.folder_of(checkpoints, step))
    if isinstance(manifest, str):
        raise UserError(Problem("the checkpoint is not whole", manifest, "the file as it was written", "--checkpoint"))
    return manifest


def _from_huggingface(folder: Path) -> LoadedRun:
    section, weights = huggingface.read(folder)
    built = model.build(section)
    built.load_state_dict({name: x.float() for name, x in weights.items()})
    if not (folder / FILE).is_file():
        raise UserError(Problem("the folder has no tokenizer", f"no {FILE}", "the tokenizer's own file", str(folder)))
    tokenizer = Tokenizer.from_folder(folder, *_special_words(folder))
    _check_ids(tokenizer, built, folder / FILE)
    dtype = huggingface.stored_dtype(weights.values())
    return LoadedRun(built.eval(), dtype, tokenizer, _generation(folder), RunSection().seed, folder)


def _special_words(folder: Path) -> tuple[str, str | None]:
    """The tokens that end a text and that pad, which tokenizer_config.json holds as text or as an object."""
    file = folder / "tokenizer_config.json"
    about = huggingface.read_json(file)
    end, pad = (x.get("content") if isinstance(x := about.get(key), dict) else x for key in ("eos_token", "pad_token"))
    if not isinstance(end, str):
        raise UserError(Problem("nothing says which token ends a text", "no eos_token", "a special token", str(file)))
    return end, pad if isinstance(pad, str) else None


def _generation(folder: Path) -> GenerationSection:
    """The sampling settings of generation_config.json, where it samples; else the defaults."""
    file = folder / "generation_config.json"
    about = huggingface.read_json(file) if file.is_file() else {}
    if not about.get("do_sample"):
        return GenerationSection()
    names = {"max_tokens": "max_new_tokens", "temperature": "temperature", "top_k": "top_k", "top_p": "top_p"}
    try:
        return GenerationSection(**{ours: about[name] for ours, name in names.items() if about.get(name) is not None})
    except ValidationError as error:
        raise UserError(*[invalid(names[str(e["loc"][0])], e, str(file)) for e in error.errors()]) from None


def _check_ids(tokenizer: Tokenizer, built: LanguageModel, where: Path) -> None:
    """Errors: UserError if the tokenizer can give an id that the embedding table has no row for."""
    if tokenizer.num_ids > built.section.vocab_size:
        want = f"at most the model's {built.section.vocab_size:,}"
        raise UserError(
            Problem("the tokenizer has more ids than the model", f"{tokenizer.num_ids:,}", want, str(where))
        )
