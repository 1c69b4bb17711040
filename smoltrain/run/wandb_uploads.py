"""What goes to W&B beside the numbers of the steps: files, code, histograms, samples, models, lines of the log.

After the first that W&B does not take there are no more: each would be waited for in vain.
"""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smoltrain.config.config_file import CONFIG_FILE
from smoltrain.config.schema import Config
from smoltrain.engine.layer_gradients import LayerGradient
from smoltrain.run.sink import HISTOGRAM_PREFIX, PublishedModel
from smoltrain.run.wandb_connection import describe_wandb_error
from smoltrain.schedule import Plan
from smoltrain.timeout import Value, call_with_timeout

PACKAGE_FOLDER = Path(__file__).parents[1]
SAMPLE_COLUMNS: list[str | int] = ["step", "prompt", "text"]
LOCAL_TIMEOUT_S = 120.0  # for what waits for this machine alone: a copy of the weights, steps read from metrics.jsonl


class WandbUploads:
    """Makes them and hands them over to `run`, which is wandb's."""

    def __init__(self, config: Config, folder: Path, say: Callable[[str], None]) -> None:
        """For the run of this folder; `say` takes the warning."""
        self._config = config
        self._folder = folder
        self._say = say
        self._plan = Plan(config.phases)
        self._samples: Any = None  # the incremental table of this process
        self.enabled = True

    def begin_run(self, run: Any) -> None:
        """Give a run that has just begun the recipe as it was resolved, and this program's sources if it asks for them.

        Its table of samples begins anew.
        """
        self._samples = None
        recipe = self._folder / CONFIG_FILE
        if recipe.exists():
            self._try("the recipe", lambda: _save_copy(run, recipe))
        if self._config.track.wandb_code:
            name = f"{self._config.run.name}-code"
            self._try("the code", lambda: run.log_code(str(PACKAGE_FOLDER), name=name), LOCAL_TIMEOUT_S)

    def make_histograms(self, step: int, layers: dict[str, LayerGradient]) -> dict[str, Any] | None:
        """One of each layer's gradient, as numbers of the step; None where they cannot be made."""

        def make() -> dict[str, Any]:
            import wandb

            return {
                HISTOGRAM_PREFIX + name: wandb.Histogram(np_histogram=(layer.counts, layer.edges))
                for name, layer in layers.items()
            }

        return self._try(f"the histograms of step {step}", make)

    def log_samples(self, run: Any, step: int, rows: list[list[Any]], last_known_step: int) -> None:
        """[step, prompt, text] of all samples so far, into a table of which W&B is sent what is new.

        The first of a process has the past too, unless W&B knows that the run goes on: offline it does not.
        """

        def upload() -> None:
            import wandb

            if self._samples is None:
                self._samples = wandb.Table(columns=SAMPLE_COLUMNS, log_mode="INCREMENTAL")
                known = run.summary.get("samples")
                is_known = known is not None and known.get("_type") == "incremental-table-file"
                new = [row for row in rows if row[0] > last_known_step] if is_known else rows
            else:
                new = [row for row in rows if row[0] == step]
            for row in new:
                self._samples.add_data(*row)
            run.log({"samples": self._samples}, step=step)

        self._try(f"the samples of step {step}", upload)

    def log_model(self, run: Any, model: PublishedModel, best_before: float | None) -> bool:
        """The checkpoint's model.safetensors and the run's tokenizer as an artifact, where the recipe wants one.

        Its aliases: step-N, latest, the phase that it ends, and best where no model before it had a lower validation
        loss than `best_before`. Returns whether W&B has taken it as the best.
        """
        step = model.step
        is_due = {
            "checkpoint": True, "phase": model.ends_phase, "end": step == self._plan.last_step, "none": False,
        }  # fmt: skip
        if not self.enabled or not is_due[self._config.track.wandb_model]:
            return False

        def copy() -> Any:
            import wandb

            metadata = {"step": step, "validation_loss_nats_per_token": model.validation_loss}
            artifact = wandb.Artifact(f"{self._config.run.name}-model", type="model", metadata=metadata)
            artifact.add_file(str(model.weights))
            for path in (self._folder / "tokenizer").rglob("*"):  # add_dir would print, whatever `silent` says
                if path.is_file():
                    artifact.add_file(str(path), name=str(path.relative_to(self._folder)))
            artifact.add_file(str(self._folder / CONFIG_FILE))
            return artifact

        aliases = [f"step-{step}", "latest"]
        if model.ends_phase:
            aliases.append(self._plan.phase(step).name)
        loss = math.inf if model.validation_loss is None else model.validation_loss
        is_best = math.isfinite(loss) and (best_before is None or loss < best_before)  # below a nan no loss ever is
        if is_best:
            aliases.append("best")
        what = f"the model of step {step}"
        artifact = self._try(what, copy, LOCAL_TIMEOUT_S)
        if artifact is None:
            return False
        return self._try(what, lambda: run.log_artifact(artifact, aliases=aliases)) is not None and is_best

    def write_log(self, run: Any, text: str) -> None:
        """A line of the console or of rank 0's log, for W&B's Logs."""
        if self.enabled:
            self._try("a line of the log", lambda: run.write_logs(text))

    def _try(self, what: str, call: Callable[[], Value], seconds: float | None = None) -> Value | None:
        """What `call` returns; None after the first that failed."""
        try:
            return call_with_timeout(call, seconds or self._config.track.wandb_timeout_s)
        except Exception as error:
            self.enabled = False
            self._say(
                f"WARNING: W&B did not accept {what} ({describe_wandb_error(error)}): no more tables, histograms, "
                "logs and models go there until the next start; training and its curves go on"
            )
            return None


def _save_copy(run: Any, recipe: Path) -> None:
    """Give W&B a copy, in a folder of the run's name: it has a config.yaml of its own, and warns of what it links."""
    copy = Path(run.dir, recipe.parent.name, recipe.name)
    copy.parent.mkdir(exist_ok=True)
    shutil.copyfile(recipe, copy)
    run.save(str(copy), base_path=run.dir, policy="now", glob=False)
