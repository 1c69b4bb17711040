"""A trained model back from its run folder, on one process and without DeepSpeed."""

import sys
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from smoltrain import checkpoint, config, model
from smoltrain.data.tokenizer import Tokenizer
from smoltrain.errors import Problem, UserError
from smoltrain.model import Decoder
from smoltrain.schema import Config


@dataclass(frozen=True)
class LoadedRun:
    """What generation needs of a run."""

    model: Decoder  # fp32, in eval mode
    tokenizer: Tokenizer
    config: Config
    step: int


def load_run(run: str, step: int | None = None) -> LoadedRun:
    """The model of a run's newest valid checkpoint, or of that of `step`; `run` is a folder or a name under runs/.

    Errors: UserError for a folder that is no run, a step that has no checkpoint, a checkpoint that does not verify.
    """
    folder = _folder(run)
    settings = config.read(folder / "config.yaml")
    manifest = _manifest(folder / "checkpoints", step)
    decoder = model.build(settings.model)
    path = checkpoint.folder_of(folder / "checkpoints", manifest.step) / "model.safetensors"
    weights = {name: tensor.float() for name, tensor in load_file(path).items()}
    missing, unexpected = decoder.load_state_dict(weights, strict=False)
    tied = set(dict(decoder.named_parameters(remove_duplicate=False))) - set(dict(decoder.named_parameters()))
    if unexpected or set(missing) - tied:
        saw = ", ".join([*unexpected, *missing])
        raise UserError(Problem("the weights do not fit the config", saw, "the config's own tensors", str(path)))
    return LoadedRun(
        decoder.eval(),
        Tokenizer.from_folder(folder / "tokenizer", settings.tokenizer.separator),
        settings,
        manifest.step,
    )


def _folder(run: str) -> Path:
    for folder in (Path(run), Path("runs") / run):
        if (folder / "config.yaml").is_file():
            return folder
    have = ", ".join(sorted(p.parent.name for p in Path("runs").glob("*/config.yaml"))) or "none yet"
    raise UserError(
        Problem("no such run", repr(run), f"a run folder, or a name under runs/ ({have})", "the RUN argument")
    )


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
