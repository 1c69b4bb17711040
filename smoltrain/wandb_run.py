"""A run as Weights & Biases keeps it: its mode, its history, tables and model artifacts. The only importer of wandb."""

import netrc
import os
import urllib.parse
from pathlib import Path
from typing import Any

from smoltrain.gradients import LayerGradient
from smoltrain.runfolder import RunFolder
from smoltrain.schema import Config

FINISH_S = 120.0  # for the last upload; what is left stays on disk for `wandb sync`
GRADIENT_HISTOGRAM = "gradients/histogram/"  # + layer: its entries


class WandbRun:
    """What a run logs goes to W&B once for each step; where W&B is off, every call does nothing."""

    def __init__(self, config: Config, folder: RunFolder, has_step: float) -> None:
        """Start W&B as `config.track` asks; steps up to `has_step` are there already."""
        self._has_step = has_step  # W&B takes back no step; most come out as they did before
        self._artifacts, self._folder = config.track.wandb_model, folder.path
        self._run: Any = None
        mode, reason = wandb_mode(config)
        self.words = self._open(config, folder, mode, reason)  # (mode, why; id) for the console

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Once for each step, however often it was done."""
        if self._run and step > self._has_step:
            self._run.log(values, step=step)

    def histograms(self, step: int, layers: dict[str, LayerGradient]) -> None:
        """One of each layer's gradient."""
        if self._run:
            import wandb

            histograms = {name: wandb.Histogram(np_histogram=(g.counts, g.edges)) for name, g in layers.items()}
            self.log(step, {GRADIENT_HISTOGRAM + name: h for name, h in histograms.items()})

    def samples(self, step: int, rows: list[list[Any]]) -> None:
        """A table of (step, prompt, text), all that were sampled so far."""
        if self._run:
            import wandb

            self.log(step, {"samples": wandb.Table(columns=["step", "prompt", "text"], data=list(rows))})

    def model(self, step: int, weights: Path, *, ends_phase: bool) -> None:
        """The checkpoint's model.safetensors and the run's tokenizer as an artifact, where the recipe wants one."""
        wanted = self._artifacts == "checkpoint" or (self._artifacts == "phase" and ends_phase)
        if not self._run or not wanted:
            return
        import wandb

        artifact = wandb.Artifact(f"{self._run.name}-model", type="model", metadata={"step": step})
        artifact.add_file(str(weights))
        artifact.add_dir(str(self._folder / "tokenizer"), name="tokenizer")
        artifact.add_file(str(self._folder / "config.yaml"))
        self._run.log_artifact(artifact, aliases=[f"step-{step}"])

    def finish(self, exit_code: int) -> None:
        """W&B learns the exit code."""
        if self._run:
            self._run.finish(exit_code=exit_code)

    def _open(self, config: Config, folder: RunFolder, mode: str, reason: str) -> str:
        """Start W&B in this mode; online falls back to offline when the server does not answer in time."""
        if mode == "off":
            return f"off, {reason}"
        import wandb

        def init(mode: str) -> Any:
            return wandb.init(
                project=config.track.wandb_project,
                id=folder.wandb_id,
                name=config.run.name,
                dir=str(folder.path),
                mode=mode,  # pyright: ignore[reportArgumentType]
                resume="allow",
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(
                    init_timeout=config.track.wandb_timeout_s,
                    finish_timeout=FINISH_S,
                    console="off",
                    silent=True,
                ),
            )

        try:
            self._run = init(mode)
        except Exception as error:  # whatever W&B raises, it must not cost a run
            first = (str(error) or type(error).__name__).splitlines()[0]
            if mode == "offline":
                return f"off, W&B cannot write here ({first})"
            wandb.teardown()  # its background process still holds the run id
            reason = f"going online failed ({first})"
            return self._open(config, folder, "offline", reason)
        return f"{mode}, {reason}; run id {folder.wandb_id}"


def wandb_mode(config: Config) -> tuple[str, str]:
    """(online | offline | off, reason), before anybody has asked the server."""
    asked = config.track.wandb
    if asked != "auto":
        return asked, "as track.wandb asks"
    named = os.environ.get("WANDB_MODE", "")
    if named in ("offline", "disabled"):
        return ("off" if named == "disabled" else named), f"WANDB_MODE={named}"
    if os.environ.get("WANDB_API_KEY") or _netrc_key(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")):
        return "online", "an API key is configured"
    return "offline", "no API key is configured (`wandb login` sets one; `wandb sync` uploads later)"


def _netrc_key(url: str) -> bool:
    try:
        return (
            netrc.netrc(os.environ.get("NETRC")).authenticators(urllib.parse.urlparse(url).hostname or "") is not None
        )
    except (OSError, netrc.NetrcParseError):
        return False
