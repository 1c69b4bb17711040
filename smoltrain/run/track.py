"""What a run logs: console, metrics.jsonl, samples.jsonl, and W&B through wandb_run.py.

Rank 0 writes; the trackers of the other ranks take the same calls and keep silent, so the loop has no `if rank == 0`.
"""

import contextlib
import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from smoltrain import files
from smoltrain.config.schema import Config
from smoltrain.console import take_console_warnings
from smoltrain.engine.layer_gradients import LayerGradient
from smoltrain.errors import DONE, FAULT
from smoltrain.files import METRICS_FILE
from smoltrain.redact import redact_text
from smoltrain.run.run_folder import SAMPLES_FILE, RunFolder
from smoltrain.run.wandb_id import UNDONE_METRICS_FILE
from smoltrain.run.wandb_run import WandbRun

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
    "validation/bits_per_byte": "validation loss in bits over the bytes (UTF-8) of its texts, spelled by an id or not",
}
SOURCE_TOKENS_PREFIX = "data/tokens_by_source/"  # + source: as data/tokens, of that source alone
CUSTOM_PREFIX = "custom/"  # + name: what a program's callback returned after the step, see train/callbacks.py
GRADIENT_NORM_PREFIX = "gradients/norm_before_clipping/"  # + layer: L2 norm of its gradient, averaged over all ranks
NAME_PREFIXES = (SOURCE_TOKENS_PREFIX, CUSTOM_PREFIX, GRADIENT_NORM_PREFIX)
SAMPLE_KEYS = ("step", "prompt", "text")


class Tracker:
    """Console, files and W&B behind one small interface."""

    def __init__(self, config: Config, folder: RunFolder, rank: int, first_step: int, last_step: int) -> None:
        """Go on after `first_step`: later lines of an interrupted run are cut off the files."""
        self._is_writer = rank == 0
        self._print_every = config.track.print_every
        self._log = open_rank_log(folder.path / "logs" / f"rank{rank}.log")
        self._wandb: WandbRun | None = None
        self._warned_kinds: set[str] = set()
        if not self._is_writer:
            return
        self._console = Console(highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        if self._console.is_terminal:
            self._progress = _start_progress_bar(self._console, first_step, last_step)
        undone = folder.path / UNDONE_METRICS_FILE
        self._metrics, _ = _reopen_jsonl(folder.path / METRICS_FILE, first_step, self.say, undone=undone)
        self._samples, lines = _reopen_jsonl(folder.path / SAMPLES_FILE, first_step, self.say, keys=SAMPLE_KEYS)
        self._sample_table = [[line.value[key] for key in SAMPLE_KEYS] for line in lines]
        self._wandb = WandbRun(config, folder, first_step, self.say)
        self.say_choice("W&B", self._wandb.description)

    def say(self, text: str) -> None:
        """Print a line on rank 0's console, without the secrets of URLs; every rank's goes to its own log."""
        text = redact_text(text)
        self._log.info(text)
        if self._is_writer:
            self._console.print(text, markup=False)
        for line in take_console_warnings():
            self._log.warning(line)

    def say_choice(self, what: str, value: str) -> None:
        """One line on what was chosen, with its reason."""
        self.say(f"{what:<22} {value}")

    def log_step(self, step: int, last_step: int, phase: str, metrics: dict[str, float | str]) -> None:
        """Everything measured at a training step: files and W&B always, the console at its cadence."""
        self.log_metrics(step, metrics)
        if not self._is_writer:
            return
        if self._progress:
            self._progress.update(self._progress.task_ids[0], completed=step, description=phase)
        if step % self._print_every == 0 or step == last_step:
            self.say(format_console_line(step, last_step, phase, metrics))

    def log_metrics(self, step: int, metrics: dict[str, float | str]) -> None:
        """Values by name, to metrics.jsonl and W&B. Errors: KeyError for a name that METRICS does not define."""
        for name in metrics:
            if name not in METRICS and not name.startswith(NAME_PREFIXES):
                raise KeyError(f"{name} is not in track.METRICS")
        if not self._is_writer:
            return
        line = {"step": step, "time_s": round(time.time(), 3), **metrics}
        self._metrics.write(files.format_json_line(line))
        self._metrics.flush()  # a kill of this process loses no step that was logged
        if self._wandb:
            self._wandb.log(step, metrics)

    def log_validation(self, step: int, loss: float, bits_per_byte: float) -> None:
        """The loss on the held-out rows, nats per token, and what follows from it."""
        perplexity = math.exp(loss) if loss < 700 else math.inf  # exp overflows a float at 710
        values = {"loss_nats_per_token": loss, "perplexity": perplexity, "bits_per_byte": bits_per_byte}
        self.log_metrics(step, {f"validation/{name}": value for name, value in values.items()})
        numbers = f"loss {loss:.4f}, perplexity {perplexity:,.1f}, {bits_per_byte:.3f} bits per byte"
        self.say(f"validation at step {step}: {numbers}")

    def warn_once(self, kind: str, text: str | None) -> None:
        """Say a warning, if there is one and it is the first of its kind."""
        if text and kind not in self._warned_kinds:
            self._warned_kinds.add(kind)
            self.say(text)

    def log_gradients(self, step: int, layers: dict[str, LayerGradient]) -> None:
        """Norm of each layer everywhere, its histogram in W&B."""
        self.log_metrics(step, {GRADIENT_NORM_PREFIX + name: layer.norm for name, layer in layers.items()})
        if self._wandb:
            self._wandb.log_histograms(step, layers)

    def log_samples(self, step: int, texts: list[tuple[str, str]]) -> None:
        """(prompt, continuation) pairs: samples.jsonl, the console, a W&B table that grows with the run."""
        if not self._is_writer:
            return
        for prompt, text in texts:
            self._samples.write(files.format_json_line({"step": step, "prompt": prompt, "text": text}))
            self._samples.flush()
            self._sample_table.append([step, prompt, text])
            shown = [f"    {_replace_control_characters(line)}".rstrip() for line in (prompt + text).splitlines()]
            self.say("\n".join([f"sample at step {step}:", *shown]))
        if self._wandb:
            self._wandb.log_samples(step, self._sample_table)

    def log_model(self, step: int, weights: Path, *, ends_phase: bool) -> None:
        """A published checkpoint's weights, for W&B where the recipe wants them there."""
        if self._wandb:
            self._wandb.log_model(step, weights, ends_phase=ends_phase)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(DONE if kind is None else FAULT)

    def close(self, exit_code: int) -> None:
        """Flush and close everything; W&B learns the exit code."""
        if self._is_writer:
            if self._progress:
                self._progress.stop()
            for file in (self._metrics, self._samples):
                with contextlib.suppress(OSError):  # whoever wrote the last line heard of it
                    file.close()
        if self._wandb:
            self._wandb.finish(exit_code)
        for handler in self._log.handlers:  # of this run alone: other handlers may be those of a whole program
            handler.flush()


def format_console_line(step: int, last_step: int, phase: str, metrics: dict[str, Any]) -> str:
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
        f"  left {_format_duration((last_step - step) * metrics['speed/step_s'])}"
    )


def _replace_control_characters(line: str) -> str:
    """A line without control characters, which a model may sample and a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\t" else "\N{REPLACEMENT CHARACTER}" for c in line)


def _format_duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _start_progress_bar(console: Console, first_step: int, last_step: int) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, transient=True)
    progress.add_task("", total=last_step, completed=first_step)
    progress.start()
    return progress


def _reopen_jsonl(
    path: Path, step: int, say: Callable[[str], None], *, keys: Sequence[str] = ("step",), undone: Path | None = None
) -> tuple[TextIO, list[files.JsonLine]]:
    """Open a .jsonl for appending after `step`: (the file, the lines that it keeps).

    Lines of later steps, which an interrupted run wrote, are cut off, as those steps are done again; they are appended
    to `undone`, if that is given. Damaged lines are set aside in a file of their own, which is said.
    """
    kept: list[files.JsonLine] = []
    later: list[files.JsonLine] = []
    damaged: list[files.JsonLine] = []
    for line in files.read_jsonl_lines(path, keys):
        if line.fault:
            damaged.append(line)
        elif line.value["step"] <= step:
            kept.append(line)
        else:
            later.append(line)
    if undone:
        _append_lines(undone, later)
    if damaged:
        aside = path.with_suffix(".damaged")
        _append_lines(aside, damaged)
        say(f"WARNING: {files.describe_damaged_lines(path, damaged)}; set aside in {aside}")
    files.keep_jsonl_lines(path, kept)  # last: a crash before leaves every line where it was
    return path.open("a", encoding="utf-8"), kept


def _append_lines(path: Path, lines: list[files.JsonLine]) -> None:
    if lines:
        with path.open("ab") as file:
            file.writelines(line.raw for line in lines)


def open_rank_log(path: Path) -> logging.Logger:
    """Open logs/rankN.log: what this rank says, and what DeepSpeed logs on it, which leaves the console."""
    path.parent.mkdir(parents=True, exist_ok=True)
    logging.raiseExceptions = False  # a full disk must not cover the console with tracebacks
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    log = logging.getLogger("smoltrain")
    log.setLevel(logging.INFO)
    log.propagate = False
    for logger in (log, logging.getLogger("DeepSpeed")):
        for old in logger.handlers:
            if isinstance(old, logging.FileHandler) or getattr(old, "stream", None) in (sys.stdout, sys.stderr):
                logger.removeHandler(old)
            if isinstance(old, logging.FileHandler) and old.baseFilename == handler.baseFilename:
                old.close()
        logger.addHandler(handler)
    return log
