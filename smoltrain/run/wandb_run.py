"""A run as Weights & Biases keeps it: connected, its history of steps, what it lacked, and its end.

W&B must not cost a run. Every call of it is made by `call_with_timeout`, in a thread that is left behind when it takes
too long, and whatever it raises is said once: tables, histograms and models end with the first that fails, all of W&B
with the first step that cannot be handed over. metrics.jsonl has every step; the next start gives W&B from it what W&B
lacks.
"""

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from smoltrain.config.schema import Config
from smoltrain.engine.layer_gradients import LayerGradient
from smoltrain.errors import DONE
from smoltrain.files import METRICS_FILE
from smoltrain.run import wandb_connection
from smoltrain.run.run_folder import RunFolder
from smoltrain.run.sink import PublishedModel, drop_texts, read_steps_between
from smoltrain.run.wandb_connection import connect_to_wandb, describe_wandb_error, resolve_wandb_mode
from smoltrain.run.wandb_id import WandbIdentity, choose_wandb_identity, next_wandb_identity, read_logged_digests
from smoltrain.run.wandb_uploads import LOCAL_TIMEOUT_S, WandbUploads
from smoltrain.timeout import call_with_timeout


class WandbRun:
    """What a run logs goes to W&B once for each step; where W&B is off or has failed, every call does nothing."""

    def __init__(
        self, config: Config, folder: RunFolder, first_step: int, say: Callable[[str], None],
        derived: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """Start W&B as `config.track` asks, for a start that goes on after `first_step`; `say` takes warnings.

        `derived`: facts that follow from the config on this machine, for the config that W&B shows.
        """
        self._config = config
        self._derived = derived
        self._folder = folder.path
        self._say = say
        self._timeout_s = config.track.wandb_timeout_s
        self._uploads = WandbUploads(config, folder.path, say)
        self._mode, self._mode_reason = resolve_wandb_mode(config)
        self._begin(choose_wandb_identity(config, folder, first_step), first_step)

    def _begin(self, identity: WandbIdentity, first_step: int) -> None:
        """Connect under this id, and give W&B the steps up to `first_step` that it lacks."""
        self._identity = identity
        self._run, description = connect_to_wandb(
            self._config, self._folder, identity, self._mode, self._mode_reason, self._derived
        )
        self._last_known_step = identity.through  # W&B takes back no step; those come out as they did before
        if self._run and self._run.settings.mode == "online":
            self._last_known_step = max(0, self._run.starting_step - 1)  # the server knows best
        self._logged_digests = read_logged_digests(self._folder, identity) if self._run else {}
        self._save_identity(open=self._run is not None)
        if self._run and self._last_known_step < first_step:
            last_sent = self._send_missing_steps(first_step)
            if last_sent:
                steps = f"steps {self._last_known_step + 1} to {last_sent}"
                description += f"; {steps}, which it lacked, come from {METRICS_FILE}"
        self.choices = [("W&B", description)]
        if self._run and self._run.settings.mode == "online" and self._run.url:  # offline wandb warns of the question
            self.choices.append(("W&B page", self._run.url))
        if self._run:
            self._uploads.begin_run(self._run)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Numbers of a step, once for each step, however often it was done; texts among them stay here.

        A step that W&B has, and that now comes out with other rows (data/ledger: the digest of all rows up to it),
        begins a new run with the past that both share.
        """
        digest = metrics.get("data/ledger")
        is_known = step <= self._last_known_step
        if self._run and is_known and digest and self._logged_digests.get(step, digest) != digest:
            self._restart_under_next_id(step)
        if self._run is None or step <= self._last_known_step:
            return
        run = self._run
        numbers = drop_texts(metrics)
        try:
            call_with_timeout(lambda: run.log(numbers, step=step), self._timeout_s)
        except Exception as error:
            rest = f"the next start gives W&B what it lacks, from {METRICS_FILE}"
            self._drop(f"W&B is dropped at step {step} ({describe_wandb_error(error)}); training goes on, and {rest}")
        else:
            self._identity = replace(self._identity, through=max(step, self._identity.through))

    def log_histograms(self, step: int, layers: dict[str, LayerGradient]) -> None:
        """One of each layer's gradient."""
        if self._takes_uploads(step):
            histograms = self._uploads.make_histograms(step, layers)
            if histograms:
                self.log(step, histograms)

    def log_samples(self, step: int, rows: list[list[Any]]) -> None:
        """[step, prompt, text] of all samples so far, of which W&B is sent what is new."""
        if self._takes_uploads(step):
            self._uploads.log_samples(self._run, step, rows, self._last_known_step)

    def log_model(self, model: PublishedModel) -> None:
        """The checkpoint's model.safetensors and the run's tokenizer as an artifact, where the recipe wants one."""
        if self._run and self._uploads.log_model(self._run, model, self._identity.best_model_loss):
            self._identity = replace(self._identity, best_model_loss=model.validation_loss)

    def write_log(self, text: str) -> None:
        """A line of the console or of rank 0's log, for W&B's Logs."""
        if self._run:
            self._uploads.write_log(self._run, text)

    def finish(self, exit_code: int) -> None:
        """W&B learns the exit code; what it could not upload in time is said."""
        run = self._run
        if run is None:
            return
        self._run = None
        self._save_identity(open=False)
        upload_s = wandb_connection.FINISH_TIMEOUT_S if self._uploads.enabled else 0  # after a failure no wait
        try:
            call_with_timeout(lambda: run.finish(exit_code=exit_code), upload_s + self._timeout_s)
            fault = _read_last_error(Path(run.settings.log_internal)) if run.settings.mode == "online" else None
        except Exception as error:
            fault = describe_wandb_error(error)
        if fault:
            folder = Path(run.settings.sync_dir)
            self._say(f"WARNING: W&B may lack the last steps ({fault}); `wandb sync {folder}` uploads them")

    def _takes_uploads(self, step: int) -> bool:
        """Whether a table or histogram of this step still goes to W&B."""
        return self._run is not None and step > self._last_known_step and self._uploads.enabled

    def _drop(self, message: str) -> None:
        """No more W&B in this process."""
        self._run = None
        self._save_identity(open=False)
        self._say(f"WARNING: {message}")

    def _restart_under_next_id(self, step: int) -> None:
        why = f"a new id: step {step} has come out with other rows than {self._identity.id} has of it"
        self.finish(DONE)
        self._begin(next_wandb_identity(self._identity, self._folder, why), step - 1)
        for what, value in self.choices:
            self._say(f"{what:<22} {value}")

    def _send_missing_steps(self, first_step: int) -> int | None:
        """Give W&B the steps that it lacks, with the times at which they were trained; the last of them, None if none.

        They come from metrics.jsonl.
        """
        run: Any = self._run
        steps = read_steps_between(self._folder / METRICS_FILE, self._last_known_step, first_step)

        def send() -> int | None:
            last_sent = None
            for step, numbers, time_s in steps:
                run.log(numbers | ({"_timestamp": time_s} if time_s else {}), step=step)
                last_sent = step
            return last_sent

        try:
            last_sent = call_with_timeout(send, LOCAL_TIMEOUT_S)
        except Exception as error:
            self._drop(f"W&B is dropped ({describe_wandb_error(error)}); training goes on without it")
            return None
        self._identity = replace(self._identity, through=max(last_sent or 0, self._identity.through))
        return last_sent

    def _save_identity(self, *, open: bool) -> None:
        """What wandb.json says, and whether this process gives W&B more: after a kill that still stands there."""
        self._identity = replace(self._identity, open=open)
        with contextlib.suppress(OSError):  # a full disk is said by what matters more
            self._identity.write(self._folder)


def _read_last_error(log: Path) -> str | None:
    """The first line of the newest error in the log of W&B's own process; None if there is none."""
    newest = ""
    with contextlib.suppress(OSError):
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if str(record.get("level", "")).startswith("ERROR"):
                    detail = f": {record['error']}" if record.get("error") else ""
                    newest = f"{record.get('msg', '')}{detail}"
    return newest.partition("\n")[0] or None
