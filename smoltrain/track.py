"""What a run writes down: console, metrics.jsonl, samples.jsonl, W&B. The only importer of wandb.

Rank 0 writes; the trackers of the other ranks take the same calls and keep silent, so the loop has no `if rank == 0`.
"""

import contextlib
import logging
import math
import netrc
import os
import sys
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from smoltrain import files
from smoltrain.errors import DONE, FAULT
from smoltrain.gradients import LayerGradient
from smoltrain.runfolder import RunFolder
from smoltrain.schema import Config

# Every name that may be logged: its unit, its scope, what it is averaged over. Anything else is refused.
METRICS = {
    "train/loss_nats_per_token": "mean over the step's valid tokens: all micro-batches, all ranks",
    "train/lr": "learning rate of the step's update",
    "train/weight_decay": "decoupled weight decay of the step's update, of the parameters that decay",
    "train/grad_norm_before_clipping": "L2 norm of the whole gradient, averaged over all ranks",
    "train/loss_scale": "factor inside fp16's gradients after the step, DeepSpeed's choice; 1 in other precisions",
    "train/skipped_updates": "updates left out so far: a gradient not finite, a spike skipped, rows passed over",
    "data/rows": "rows consumed so far, those of skipped updates too, all ranks",
    "data/tokens": "targets consumed so far, those of skipped updates too, all ranks",
    "data/epochs": "rows consumed so far over the rows there are; of a single source in cached mode",
    "data/unique_rows": "rows consumed so far none of whose tokens came twice, all ranks",
    "data/unique_documents": "documents begun so far, each counted in the first epoch of its source alone, all ranks",
    "data/unique_contents": "different texts among them, estimated to 0.8 %, all ranks; at the console's cadence",
    "data/repeat_factor": "rows consumed so far over data/unique_rows",
    "data/bad_records": "records skipped so far in streams because they could not be read, all ranks",
    "data/ledger": "digest of every row id and token so far, the same on any number of ranks (text)",
    "speed/tokens_per_s": "targets of the step over speed/step_s, all ranks together",
    "speed/step_s": "seconds of the step, the slowest rank; no evaluation, sampling, saving, looking at gradients",
    "speed/steps_per_s": "optimizer steps per second: 1 over speed/step_s",
    "speed/data_wait_share": "share of the step spent waiting for rows, the worst rank",
    "memory/peak_gib": "peak so far, the largest rank: CUDA memory allocated, or resident set on a CPU",
    "speed/checkpoint_pause_s": "seconds that training stood still for a checkpoint, the slowest rank",
    "validation/loss_nats_per_token": "mean over the validation rows' tokens, all ranks",
    "validation/perplexity": "exp of the validation loss",
    "validation/bits_per_byte": "validation loss in bits over the UTF-8 bytes of its tokens; separators have none",
}
WANDB_FINISH_S = 120.0  # for the last upload; what is left stays on disk for `wandb sync`
SOURCE_TOKENS = "data/tokens_by_source/"  # + source: as data/tokens, of that source alone
UNDONE = "metrics.undone.jsonl"  # lines of steps that were done again, after a kill or a rewind
GRADIENT_NORM = "gradients/norm_before_clipping/"  # + layer: L2 norm of that layer's whole gradient, all ranks averaged
GRADIENT_HISTOGRAM = "gradients/histogram/"  # + layer: its entries, W&B only


def open(config: Config, folder: RunFolder, rank: int, first_step: int, last_step: int) -> "Tracker":
    """A tracker that goes on after `first_step`: later lines of an interrupted run are cut off the files."""
    return Tracker(config, folder, rank, first_step, last_step)


class Tracker:
    """Console, files and W&B behind one small interface."""

    def __init__(self, config: Config, folder: RunFolder, rank: int, first_step: int, last_step: int) -> None:
        self._writes = rank == 0
        self._print_every, self._artifacts, self._folder = (
            config.track.print_every,
            config.track.wandb_model,
            folder.path,
        )
        self._log = rank_log(folder.path / "logs" / f"rank{rank}.log")
        self._wandb: Any = None
        self._warned: set[str] = set()
        if not self._writes:
            return
        self._console = Console(highlight=False, soft_wrap=True)
        self._progress = _progress(self._console, first_step, last_step) if self._console.is_terminal else None
        self._metrics = _reopen(folder.path / "metrics.jsonl", first_step, self.say, folder.path / UNDONE)
        self._wandb_has = _last_step(
            folder.path / UNDONE, self.say
        )  # W&B takes back no step; most come out as they did before
        self._samples = _reopen(folder.path / "samples.jsonl", first_step, self.say)
        self._table = _sample_rows(folder.path / "samples.jsonl")
        mode, reason = wandb_mode(config)
        self.chosen("W&B", self._open_wandb(config, folder, mode, reason))

    def say(self, text: str) -> None:
        """One line for the person who watches."""
        self._log.info(text)
        if self._writes:
            self._console.print(text, markup=False)

    def chosen(self, what: str, value: str) -> None:
        """One line on a choice and its reason."""
        self.say(f"{what:<22} {value}")

    def step(self, step: int, last_step: int, phase: str, metrics: dict[str, float | str]) -> None:
        """Everything measured at a training step: files and W&B always, the console at its cadence."""
        self.metrics(step, metrics)
        if not self._writes:
            return
        if self._progress:
            self._progress.update(self._progress.task_ids[0], completed=step, description=phase)
        if step % self._print_every == 0 or step == last_step:
            self.say(console_line(step, last_step, phase, metrics))

    def metrics(self, step: int, metrics: dict[str, float | str]) -> None:
        """Numbers by name. Errors: KeyError for a name that METRICS does not define."""
        for name in metrics:
            if name not in METRICS and not name.startswith((GRADIENT_NORM, SOURCE_TOKENS)):
                raise KeyError(f"{name} is not in track.METRICS")
        if not self._writes:
            return
        line = {"step": step, "time_s": round(time.time(), 3), **metrics}
        self._metrics.write(files.json_line(line))
        self._metrics.flush()
        self._to_wandb(step, {k: v for k, v in metrics.items() if not isinstance(v, str)})

    def _to_wandb(self, step: int, values: dict[str, Any]) -> None:
        """Once for each step, however often it was done."""
        if self._wandb and step > self._wandb_has:
            self._wandb.log(values, step=step)

    def validation(self, step: int, loss: float, bits_per_byte: float) -> None:
        """The loss on the held-out rows, nats per token, and what follows from it."""
        perplexity = math.exp(loss) if loss < 700 else math.inf
        numbers = {"loss_nats_per_token": loss, "perplexity": perplexity, "bits_per_byte": bits_per_byte}
        self.metrics(step, {f"validation/{name}": value for name, value in numbers.items()})
        in_words = f"loss {loss:.4f}, perplexity {perplexity:,.1f}, {bits_per_byte:.3f} bits per byte"
        self.say(f"validation at step {step}: {in_words}")

    def warn(self, kind: str, text: str) -> None:
        """A warning, the first time that there is one of its kind; '' is none."""
        if text and kind not in self._warned:
            self._warned.add(kind)
            self.say(text)

    def gradients(self, step: int, layers: dict[str, LayerGradient]) -> None:
        """Norm of each layer everywhere, its histogram in W&B."""
        self.metrics(step, {GRADIENT_NORM + name: layer.norm for name, layer in layers.items()})
        if self._wandb:
            import wandb

            histograms = {name: wandb.Histogram(np_histogram=(g.counts, g.edges)) for name, g in layers.items()}
            self._to_wandb(step, {GRADIENT_HISTOGRAM + name: h for name, h in histograms.items()})

    def samples(self, step: int, texts: list[tuple[str, str]]) -> None:
        """(prompt, continuation) pairs: samples.jsonl, the console, a W&B table that grows with the run."""
        if not self._writes:
            return
        for prompt, text in texts:
            self._samples.write(files.json_line({"step": step, "prompt": prompt, "text": text}))
            self._samples.flush()
            self._table.append([step, prompt, text])
            indented = "\n".join(f"    {_printable(line)}".rstrip() for line in (prompt + text).splitlines())
            self.say(f"sample at step {step}:\n{indented}")
        if self._wandb:
            import wandb

            table = wandb.Table(columns=["step", "prompt", "text"], data=list(self._table))
            self._to_wandb(step, {"samples": table})

    def model(self, step: int, weights: Path, *, ends_phase: bool) -> None:
        """The checkpoint's model.safetensors and the run's tokenizer as a W&B artifact, where the recipe wants one."""
        wanted = self._artifacts == "checkpoint" or (self._artifacts == "phase" and ends_phase)
        if not self._wandb or not wanted:
            return
        import wandb

        artifact = wandb.Artifact(f"{self._wandb.name}-model", type="model", metadata={"step": step})
        artifact.add_file(str(weights))
        artifact.add_dir(str(self._folder / "tokenizer"), name="tokenizer")
        artifact.add_file(str(self._folder / "config.yaml"))
        self._wandb.log_artifact(artifact, aliases=[f"step-{step}"])

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(DONE if kind is None else FAULT)

    def close(self, exit_code: int) -> None:
        """Flush and close everything; W&B learns the exit code."""
        if self._writes:
            if self._progress:
                self._progress.stop()
            for file in (self._metrics, self._samples):
                with contextlib.suppress(OSError):  # whoever wrote the last line heard of it
                    file.close()
        if self._wandb:
            self._wandb.finish(exit_code=exit_code)
        logging.shutdown()

    def _open_wandb(self, config: Config, folder: RunFolder, mode: str, reason: str) -> str:
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
                    finish_timeout=WANDB_FINISH_S,
                    console="off",
                    silent=True,
                ),
            )

        try:
            self._wandb = init(mode)
        except Exception as error:  # whatever W&B raises, it must not cost a run
            first = (str(error) or type(error).__name__).splitlines()[0]
            if mode == "offline":
                return f"off, W&B cannot write here ({first})"
            wandb.teardown()  # its background process still holds the run id
            reason = f"going online failed ({first})"
            return self._open_wandb(config, folder, "offline", reason)
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


def console_line(step: int, last_step: int, phase: str, metrics: dict[str, Any]) -> str:
    """The numbers of one step for a person."""
    width = len(str(last_step))
    return (
        f"step {step:>{width}}/{last_step} {phase}"
        f"  loss {metrics['train/loss_nats_per_token']:.4f}"
        f"  lr {metrics['train/lr']:.2e}"
        f"  grad {metrics['train/grad_norm_before_clipping']:.3f}"
        f"  {metrics['speed/tokens_per_s']:,.0f} tok/s"
        f"  mem {metrics['memory/peak_gib']:.2f} GiB"
        f"  wait {metrics['speed/data_wait_share']:.1%}"
        f"  left {_clock((last_step - step) * metrics['speed/step_s'])}"
    )


def _printable(line: str) -> str:
    """A line without control characters, which a model may sample and a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\t" else "\N{REPLACEMENT CHARACTER}" for c in line)


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _progress(console: Console, first_step: int, last_step: int) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, transient=True)
    progress.add_task("", total=last_step, completed=first_step)
    progress.start()
    return progress


def _reopen(path: Path, step: int, say: Callable[[str], None], undone: Path | None = None) -> Any:
    """Open a .jsonl for appending after `step`; what an interrupted run wrote beyond it is about to happen again.

    It is kept in `undone`, if that is given. Damaged lines are set aside in a file of their own, which is said.
    """
    lines = list(files.lines(path))
    beyond = [line for line in lines if not line.fault and line.value["step"] > step]
    damaged = [line for line in lines if line.fault]
    if undone:
        _append(undone, beyond)
    if damaged:
        aside = path.with_suffix(".damaged")
        _append(aside, damaged)
        say(f"WARNING: {files.damage(path, damaged)}; set aside in {aside}")
    if path.exists():
        kept = [line for line in lines if not line.fault and line.value["step"] <= step]
        files.write_text(path, b"".join(line.raw for line in kept).decode())
    return path.open("a", encoding="utf-8")


def _append(path: Path, lines: list[files.Line]) -> None:
    if lines:
        with path.open("ab") as file:
            file.writelines(line.raw for line in lines)


def _last_step(path: Path, say: Callable[[str], None]) -> int:
    """The last step that a .jsonl tells of; 0 if there is none."""
    told = files.json_lines(path, say=lambda text: say(f"WARNING: {text}"))
    return max((line["step"] for line in told), default=0)


def _sample_rows(path: Path) -> list[list[Any]]:
    """What `_reopen` kept, which has said what is damaged."""
    keys = ("step", "prompt", "text")
    return [[line[key] for key in keys] for line in files.json_lines(path, keys, say=lambda _: None)]


def rank_log(path: Path) -> logging.Logger:
    """logs/rankN.log: what this rank said, and every warning of DeepSpeed and torch on it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    logging.raiseExceptions = False  # a full disk must not cover the console with tracebacks
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    log = logging.getLogger("smoltrain")
    log.setLevel(logging.INFO)
    log.propagate = False
    for logger in (log, logging.getLogger("DeepSpeed")):
        for old in logger.handlers:
            if isinstance(old, logging.FileHandler) or getattr(old, "stream", None) in (sys.stdout, sys.stderr):
                logger.removeHandler(old)
        logger.addHandler(handler)
    return log
