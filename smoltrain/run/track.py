"""What a run logs: metrics.jsonl, samples.jsonl, the console through screen.py, W&B and other sinks (sink.py).

Rank 0 writes; the trackers of the other ranks take the same calls and keep silent, so the loop has no `if rank == 0`.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smoltrain import files
from smoltrain.config.schema import Config
from smoltrain.console import take_console_warnings
from smoltrain.engine.layer_gradients import LayerGradient
from smoltrain.engine.layer_weights import LayerWeight
from smoltrain.errors import DONE, FAULT, exception_message
from smoltrain.files import METRICS_FILE
from smoltrain.redact import redact_text
from smoltrain.run.guarded_sink import open_guarded_sinks
from smoltrain.run.rank_log import open_rank_log
from smoltrain.run.reopen_records import reopen_jsonl
from smoltrain.run.run_ending import EndingKind, read_ending, remove_ending, write_ending
from smoltrain.run.run_folder import SAMPLES_FILE, RunFolder
from smoltrain.run.run_warnings import lost_steps_warning
from smoltrain.run.screen import (
    Screen,
    cut_sample,
    format_choice,
    format_step_line,
    format_task_line,
    format_validation_line,
)
from smoltrain.run.sink import PublishedModel, Sink
from smoltrain.run.time_left import TimeLeft
from smoltrain.run.wandb_id import UNDONE_METRICS_FILE
from smoltrain.run.wandb_run import WandbRun

# Every name that may be logged: its unit, its scope, what it is averaged over. Anything else is refused.
METRICS = {
    "train/loss_nats_per_token": "mean over the step's valid tokens: all micro-batches, all ranks",
    "train/lr": "learning rate of the step's update; muon's embeddings and head: x optimizer.embedding_lr_factor",
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
    "speed/mfu": "share of the peak that the start says: targets/s x (6 N + 12 L D T) over it, all ranks together",
    "speed/data_wait_share": "share of the step spent waiting for rows, the worst rank",
    "speed/communication_mb": "10^6 bytes that rank 0 sends in the step's collectives, by their tensors' sizes",
    "speed/communication_s": "seconds in collectives in the step before, the rank with the fewest: the network's",
    "speed/rank_wait_s": "seconds in collectives in the step before, beyond speed/communication_s: mean over ranks",
    "memory/peak_gib": "peak since the start, the largest rank: CUDA memory allocated, or resident set on a CPU",
    "speed/checkpoint_pause_s": "seconds that training stood still for a checkpoint, the slowest rank",
    "speed/evaluation_s": "seconds of an evaluation, the slowest rank",
    "speed/task_evaluation_s": "seconds in which the tasks of evaluate.tasks were measured, the slowest rank",
    "speed/memorisation_s": "seconds in which it was measured what the model copies, the slowest rank",
    "speed/sampling_s": "seconds in which the model wrote samples, the slowest rank",
    "speed/start_s": "seconds from the command's start, or the end of the phase before, to the first step; per start",
    "speed/preparation_s": "seconds of speed/start_s in which data were found, tokenised and checked; per start",
    "speed/closing_s": "seconds from the last step's end until checkpoint and plots were written, rank 0; per start",
    "validation/loss_nats_per_token": "mean over the validation rows' tokens, all ranks",
    "validation/best_loss_nats_per_token": "lowest finite validation loss of the run so far, all ranks",
    "validation/perplexity": "exp of the validation loss",
    "validation/bits_per_byte": "validation loss in bits over the bytes (UTF-8) of its texts, spelled by an id or not",
    "memorisation/share_of_13_grams": "of the 13-grams written after held-out prompts, those in the training tokens",
    "memorisation/share_of_50_grams": "the same of its 50-grams",
    "memorisation/recalled_share_of_13_grams": "the same of the 13-grams written after beginnings of training rows",
    "memorisation/recalled_share_of_50_grams": "the same of the 50-grams written after them",
    "memorisation/held_out_share_of_13_grams": "the same of the 13-grams that really follow the held-out prompts",
    "memorisation/held_out_share_of_50_grams": "the same of the 50-grams that really follow them",
}
VALIDATION_LOSS = "validation/loss_nats_per_token"
SOURCE_TOKENS_PREFIX = "data/tokens_by_source/"  # + source: as data/tokens, of that source alone
CUSTOM_PREFIX = "custom/"  # + name: what a program's callback returned after the step, see training/callbacks.py
GRADIENT_NORM_PREFIX = "gradients/norm_before_clipping/"  # + layer: L2 norm of its gradient, averaged over all ranks
WEIGHT_NORM_PREFIX = "weights/norm_before_update/"  # + layer: L2 norm of its fp32 master weights, all ranks together
# + layer: L2 norm of what the update changed of its fp32 master weights (decay and clipping too) over the norm before
UPDATE_RATIO_PREFIX = "weights/update_to_weight_ratio/"
TASK_PREFIX = "evaluation/"  # + task/metric: of all its documents, or the first evaluate.tasks_limit; see evaluation.md
NAME_PREFIXES = (
    SOURCE_TOKENS_PREFIX, CUSTOM_PREFIX, GRADIENT_NORM_PREFIX, WEIGHT_NORM_PREFIX, UPDATE_RATIO_PREFIX, TASK_PREFIX,
)  # fmt: skip
SAMPLE_KEYS = ("step", "prompt", "text")


class Tracker:
    """Console, files and all sinks behind one small interface."""

    def __init__(
        self, config: Config, folder: RunFolder, rank: int, first_step: int, last_step: int, *,
        choices_were_said: bool = False, derived: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Go on after `first_step`: later lines of an interrupted run are cut off the files.

        `last_step` is where the whole command ends. `choices_were_said`: an earlier start of this command has
        shown what was chosen, so only what is chosen otherwise now is shown. `derived`: facts that follow from the
        config on this machine, for the sinks.
        """
        self._is_writer = rank == 0
        self._print_every = config.track.print_every
        self._last_step = last_step
        self._log = open_rank_log(folder.path / "logs" / f"rank{rank}.log")
        self._sinks: list[Sink] = []
        self._warned_kinds: set[str] = set()
        self._folder = folder.path
        self._losses: dict[int, float] = {}  # of all validations so far, by step
        if not self._is_writer:
            return
        was_killed = read_ending(self._folder) is None
        remove_ending(self._folder)
        self._choices_file = folder.path / "logs" / "choices.json"
        self._choices: dict[str, str] = {}
        self._shown_choices = read_choices(self._choices_file) if choices_were_said else {}
        self._screen = Screen()
        self._time_left = TimeLeft(config, last_step, restarts="SMOLTRAIN_SUPERVISOR" in os.environ)
        undone = folder.path / UNDONE_METRICS_FILE
        self._metrics, past, later = reopen_jsonl(folder.path / METRICS_FILE, first_step, self.say, undone=undone)
        if was_killed and later:
            self.say(lost_steps_warning(first_step, max(line.value["step"] for line in later)))
        for line in past:
            self._time_left.add_past(line.value)
            if VALIDATION_LOSS in line.value:
                self._losses[line.value["step"]] = line.value[VALIDATION_LOSS]
        self._samples, lines, _ = reopen_jsonl(folder.path / SAMPLES_FILE, first_step, self.say, keys=SAMPLE_KEYS)
        self._sample_table = [[line.value[key] for key in SAMPLE_KEYS] for line in lines]
        self._sinks.append(WandbRun(config, folder, first_step, self.say, derived or {}))
        self._sinks += open_guarded_sinks(config, folder, first_step, self.say, derived or {})
        for sink in self._sinks:
            for what, value in sink.choices:
                self.say_choice(what, value)
        self._screen.start_bar(first_step, last_step)

    def say(self, text: str) -> None:
        """Print a line on rank 0's console, without the secrets of URLs; every rank's goes to its own log."""
        text = redact_text(text)
        self.write_log(text)
        if self._is_writer:
            self._screen.say(text)

    def say_choice(self, what: str, value: str) -> None:
        """One line on what was chosen, with its reason; not shown again if an earlier phase has shown the same."""
        value = redact_text(value)
        self.write_log(format_choice(what, value))
        if not self._is_writer:
            return
        self._choices[what] = value
        if self._shown_choices.get(what) != value:
            self._screen.say_choice(what, value)

    def say_summary(self, text: str) -> None:
        """Several lines, of which those that are indented (commands, tables) stay whole on any terminal."""
        text = redact_text(text)
        self.write_log(text)
        if self._is_writer:
            self._screen.say_summary(text)

    def write_log(self, text: str) -> None:
        """A line for this rank's log alone."""
        text = redact_text(text)
        self._log.info(text)
        for sink in self._sinks:
            sink.write_log(text)
        for line in take_console_warnings():
            self._log.warning(line)

    def show_activity(self, activity: str) -> contextlib.AbstractContextManager[None]:
        """While the block runs, a terminal's bar says that this is done; it moves all the time."""
        return self._screen.show_activity(activity) if self._is_writer else contextlib.nullcontext()

    def log_step(self, step: int, last_step: int, phase: str, metrics: dict[str, float | str]) -> None:
        """Everything measured at a training step: files and sinks always, the console when it is due or last."""
        self.log_metrics(step, metrics)
        if not self._is_writer:
            return
        left_s = self._time_left.estimate_s(step)
        self._screen.show_step(step, phase, metrics, left_s)
        if step % self._print_every == 0 or step == last_step:
            line = format_step_line(step, self._last_step, phase, metrics, left_s)
            self.write_log(line)
            self._screen.say_step(step, self._last_step, phase, metrics, left_s)

    def log_metrics(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """Values by name, to metrics.jsonl and all sinks. Errors: KeyError for a name that METRICS does not define."""
        for name in metrics:
            if name not in METRICS and not name.startswith(NAME_PREFIXES):
                raise KeyError(f"{name} is not in track.METRICS")
        if not self._is_writer:
            return
        line = {"step": step, "time_s": round(time.time(), 3), **metrics}
        self._metrics.write(files.format_json_line(line))
        self._metrics.flush()  # a kill of this process loses no step that was logged
        self._time_left.add(metrics)
        for sink in self._sinks:
            sink.log(step, metrics)

    def log_validation(self, step: int, loss: float, bits_per_byte: float, durations: Mapping[str, float]) -> None:
        """The loss on the held-out rows, nats per token, and what follows from it; with the times that it took."""
        perplexity = math.exp(loss) if loss < 700 else math.inf  # exp overflows a float at 710
        values: dict[str, float | str] = {
            VALIDATION_LOSS: loss, "validation/perplexity": perplexity, "validation/bits_per_byte": bits_per_byte,
        }  # fmt: skip
        best_before = self._find_best_loss()
        self._losses[step] = loss
        best = self._find_best_loss()
        if math.isfinite(best):
            values["validation/best_loss_nats_per_token"] = best
        self.log_metrics(step, {**values, **durations})
        if not self._is_writer:  # rank 0 alone knows the earlier ones
            return
        self.write_log(format_validation_line(step, loss, perplexity, bits_per_byte, best_before))
        self._screen.say_validation(step, loss, perplexity, bits_per_byte, best_before)

    def _find_best_loss(self) -> float:
        """The lowest finite one; inf before there is any."""
        return min(filter(math.isfinite, self._losses.values()), default=math.inf)

    def log_tasks(self, step: int, tasks: Mapping[str, Mapping[str, float]], durations: Mapping[str, float]) -> None:
        """The metrics of each task, with the times that they took; standard errors stand behind their metrics."""
        values = {
            f"{TASK_PREFIX}{task}/{name}": value for task, metrics in tasks.items() for name, value in metrics.items()
        }
        self.log_metrics(step, {**values, **durations})
        for task, metrics in tasks.items():
            self.say(format_task_line(step, task, metrics))

    def warn_once(self, kind: str, text: str | None) -> None:
        """Say a warning, if there is one and it is the first of its kind."""
        if text and kind not in self._warned_kinds:
            self._warned_kinds.add(kind)
            self.say(text)

    def log_gradients(self, step: int, layers: dict[str, LayerGradient]) -> None:
        """Norm of each layer's gradient everywhere, its histogram in the sinks."""
        self.log_metrics(step, {GRADIENT_NORM_PREFIX + name: layer.norm for name, layer in layers.items()})
        for sink in self._sinks:
            sink.log_histograms(step, layers)

    def log_weights(self, step: int, layers: dict[str, LayerWeight]) -> None:
        """Each layer's weights before the update of this step, and how far it moved them."""
        norms = {WEIGHT_NORM_PREFIX + name: layer.norm for name, layer in layers.items()}
        ratios = {UPDATE_RATIO_PREFIX + name: layer.update_ratio for name, layer in layers.items()}
        self.log_metrics(step, {**norms, **ratios})

    def log_samples(self, step: int, texts: list[tuple[str, str]]) -> None:
        """(prompt, continuation) pairs: samples.jsonl, the console, all sinks."""
        if not self._is_writer:
            return
        for prompt, text in texts:
            self._samples.write(files.format_json_line({"step": step, "prompt": prompt, "text": text}))
            self._samples.flush()
            self._sample_table.append([step, prompt, text])
            shown = redact_text(prompt + text)
            self.write_log("\n".join([f"sample at step {step}:", *cut_sample(shown, None, SAMPLES_FILE)]))
            self._screen.say_sample(step, shown, SAMPLES_FILE)
        for sink in self._sinks:
            sink.log_samples(step, self._sample_table)

    def log_model(self, step: int, weights: Path, *, ends_phase: bool) -> None:
        """A published checkpoint's weights, for W&B where the recipe wants them there."""
        model = PublishedModel(step, weights, ends_phase, self._losses.get(step))
        for sink in self._sinks:
            sink.log_model(model)

    def record_ending(self, kind: EndingKind, reason: str) -> None:
        """Write down how this start ends: for `smoltrain runs`, which cannot ask a process that has left."""
        if self._is_writer:
            with contextlib.suppress(OSError):  # of a full disk, perhaps: then the run looks as one that was killed
                write_ending(self._folder, kind, reason)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if error is not None:
            self.record_ending("failed", f"{type(error).__name__}: {exception_message(error)}")
        self.close(DONE if kind is None else FAULT)

    def close(self, exit_code: int) -> None:
        """Flush and close everything; W&B learns the exit code."""
        if self._is_writer:
            for file in (self._metrics, self._samples):
                with contextlib.suppress(OSError):  # whoever wrote the last line heard of it
                    file.close()
            with contextlib.suppress(OSError):  # without this one the next phase shows all of its choices
                files.write_json_file(self._choices_file, self._choices)
        for sink in self._sinks:
            with self.show_activity(f"closing {sink.choices[0][0]}"):
                sink.finish(exit_code)
        if self._is_writer:
            self._screen.close()
        for handler in self._log.handlers:  # of this run alone: other handlers may be those of a whole program
            handler.flush()


def read_choices(path: Path) -> dict[str, str]:
    """What an earlier phase has shown of what it chose, by name; {} if nobody can say."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
