"""A run as Weights & Biases keeps it: its mode, its history, tables and model artifacts. The only importer of wandb.

W&B must not cost a run. Every call of it is made by `call_with_timeout`, in a thread that is left behind when it takes
too long, and whatever it raises is said once: tables, histograms and models end with the first that fails, all of W&B
with the first step that cannot be handed over. metrics.jsonl has every step; the next start gives W&B from it what W&B
lacks.

connecting   resolve_wandb_mode says online, offline or off; connect_to_wandb starts W&B, online or at least offline
logging      WandbRun
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from smoltrain import files
from smoltrain.config.config_file import CONFIG_FILE
from smoltrain.config.load import redacted_config
from smoltrain.config.schema import Config
from smoltrain.config.wandb_env import read_wandb_environment
from smoltrain.engine.layer_gradients import LayerGradient
from smoltrain.errors import DONE
from smoltrain.files import METRICS_FILE
from smoltrain.run.run_folder import RunFolder
from smoltrain.run.sink import HISTOGRAM_PREFIX, PublishedModel, drop_texts, read_steps_between
from smoltrain.run.wandb_id import WandbIdentity, choose_wandb_identity, next_wandb_identity, read_logged_digests
from smoltrain.schedule import Plan
from smoltrain.timeout import Value, call_with_timeout

PACKAGE_FOLDER = Path(__file__).parents[1]
TOKENS = "data/tokens"  # the other axis, beside the step
# What the table of runs shows of a metric: by default its last value, which a diverged run has lost.
SUMMARIES = {
    "train/loss_nats_per_token": "min,last",
    "validation/loss_nats_per_token": "min,last",
    "validation/perplexity": "min,last",
    "validation/bits_per_byte": "min,last",
    "speed/tokens_per_s": "mean,last",
    "speed/mfu": "mean,last",
    "memory/peak_gib": "max",
}
SAMPLE_COLUMNS: list[str | int] = ["step", "prompt", "text"]
START_TIMEOUT_S = 45.0  # for W&B's own process to start, beside the seconds that its server has
FINISH_TIMEOUT_S = 120.0  # for the last upload; what is left stays on disk for `wandb sync`
LOCAL_TIMEOUT_S = 120.0  # for what waits for this machine alone: a copy of the weights, steps read from metrics.jsonl
TRUE_WORDS = ("1", "on", "yes", "true")


# ---- connecting


@dataclass(frozen=True)
class WandbSystemSettings:
    """What wandb itself reads from this machine's environment and files."""

    mode: str  # as wandb calls it: online, offline, dryrun, shared, disabled
    source: str  # where the mode comes from, for the console
    server: str | None  # its URL, None for the usual one
    has_key: bool  # there are credentials for this server


def resolve_wandb_mode(config: Config) -> tuple[str, str]:
    """(online | offline | off, reason), before anybody has asked the server.

    `auto` agrees with what wandb itself reads: its variables, its settings files, and credentials for the server that
    these name.
    """
    mode_variable = _normalise_mode_variable()
    if "wandb" not in config.track.to:
        return "off", "track.to leaves it out"
    if config.track.wandb != "auto":
        return config.track.wandb, "as track.wandb asks"
    disabled = os.environ.get("WANDB_DISABLED", "")
    if disabled.lower() in TRUE_WORDS:
        return "off", f"WANDB_DISABLED={disabled}"
    try:
        settings = _read_system_settings()
    except Exception as error:  # with which wandb would not start either
        return "off", f"W&B's own settings are wrong ({_describe_wandb_error(error)})"
    source = f"WANDB_MODE={mode_variable}" if mode_variable else settings.source
    if settings.mode == "disabled":
        return "off", source
    if settings.mode in ("offline", "dryrun"):
        return "offline", source
    if not settings.has_key:
        where = f" for {settings.server}" if settings.server else ""
        return "offline", f"no API key is configured{where} (`wandb login` sets one; `wandb sync` uploads later)"
    shared = ", the only writer of a shared run" if settings.mode == "shared" else ""
    return "online", f"an API key is configured{shared}"


def _normalise_mode_variable() -> str:
    """WANDB_MODE as the user wrote it, '' without one; in this process's environment it is left as wandb takes it."""
    mode = os.environ.get("WANDB_MODE", "").strip()
    if mode:
        os.environ["WANDB_MODE"] = mode.lower()  # wandb takes no other
    else:
        os.environ.pop("WANDB_MODE", None)  # with an empty one wandb would not start
    return mode


def _read_system_settings() -> WandbSystemSettings:
    """Errors: those of wandb for settings that it refuses."""
    import wandb
    from wandb.sdk.lib import wbauth

    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    settings = wandb.Settings(silent=True, settings_system=str(folder / "settings"))
    settings.update_from_system_settings()
    sources = ", ".join(str(path) for path in settings.read_system_settings().sources)
    settings.update_from_env_vars(dict(os.environ))  # they win over the files
    key = settings.api_key or settings.identity_token_file or wbauth.read_netrc_auth(host=settings.base_url)
    return WandbSystemSettings(
        mode=settings.mode,
        source=f"mode = {settings.mode} in {sources}",
        server=None if settings.base_url == wandb.Settings().base_url else settings.base_url,
        has_key=bool(key),
    )


def find_wandb_server() -> str:
    """The URL of the server that W&B's settings name. Errors: those of wandb for settings that it refuses."""
    import wandb

    return _read_system_settings().server or str(wandb.Settings().base_url)


def connect_to_wandb(
    config: Config, folder: Path, identity: WandbIdentity, mode: str, reason: str, derived: Mapping[str, Any]
) -> tuple[Any, str]:
    """Begin or resume a run of W&B: (wandb's run, or None where it is off; what the console says of it).

    Online falls back to offline when the server does not answer in time.
    """
    seconds = config.track.wandb_timeout_s + START_TIMEOUT_S
    run: Any = None
    if mode == "online":
        try:
            run = call_with_timeout(lambda: _init_wandb(config, folder, identity.id, "online", derived), seconds)
        except Exception as error:
            mode = "offline"
            reason = f"going online failed ({_describe_wandb_error(error)})"
            import wandb

            with contextlib.suppress(Exception):  # its background process still holds the run id
                call_with_timeout(wandb.teardown, config.track.wandb_timeout_s)
    if mode == "offline":
        try:
            run = call_with_timeout(lambda: _init_wandb(config, folder, identity.id, "offline", derived), seconds)
        except Exception as error:
            reason = f"W&B cannot write here ({_describe_wandb_error(error)})"
    if run is None:
        return None, f"off, {reason}"
    why = f", {identity.why}" if identity.why else ""
    return run, f"{mode}, {reason}; run id {identity.id}{why}{_describe_environment(config)}"


def _init_wandb(config: Config, folder: Path, run_id: str, mode: str, derived: Mapping[str, Any]) -> Any:
    """Begin or resume, and tell W&B which axes and summaries the metrics have. Errors: whatever wandb raises."""
    import wandb

    track = config.track
    settings = wandb.Settings(
        init_timeout=track.wandb_timeout_s, finish_timeout=FINISH_TIMEOUT_S, finish_timeout_raises=True,
        console="off", silent=True,
    )  # fmt: skip
    run = wandb.init(
        project=track.wandb_project, entity=track.wandb_entity, id=run_id, name=track.wandb_name or config.run.name,
        group=track.wandb_group, job_type=track.wandb_job_type, tags=track.wandb_tags or None, notes=track.wandb_notes,
        dir=str(folder), mode=mode,  # pyright: ignore[reportArgumentType]
        resume="allow", config=redacted_config(config) | {"derived": dict(derived)}, settings=settings,
    )  # fmt: skip
    run.define_metric(TOKENS, summary="last")
    for name, summary in SUMMARIES.items():
        # Runs with other batches are compared by what they have read: validation is drawn over tokens.
        axis = TOKENS if name.startswith("validation/") else None
        run.define_metric(name, step_metric=axis, summary=summary)
    return run


def _describe_environment(config: Config) -> str:
    """Which keys come from the environment, and which variables the command line has beaten; '' where none is set."""
    notes: list[str] = []
    for setting in read_wandb_environment(config.track.model_dump(), os.environ):
        if setting.key == "wandb":  # the mode, whose reason is said already
            continue
        value = getattr(config.track, setting.key)
        name = f"track.{setting.key}={','.join(value) if isinstance(value, tuple) else value}"
        if value == setting.value:
            notes.append(f"{name} by {setting.variable}")
        else:
            notes.append(f"{name} by the command line, not by {setting.variable}")
        if setting.note:
            notes.append(setting.note)
    return "".join(f"; {note}" for note in notes)


# ---- logging


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
        self._plan = Plan(config.phases)
        self._uploads_enabled = True  # tables, histograms, files and models
        self._mode, self._mode_reason = resolve_wandb_mode(config)
        self._begin(choose_wandb_identity(config, folder, first_step), first_step)

    def _begin(self, identity: WandbIdentity, first_step: int) -> None:
        """Connect under this id, and give W&B the steps up to `first_step` that it lacks."""
        self._identity = identity
        self._run, description = connect_to_wandb(
            self._config, self._folder, identity, self._mode, self._mode_reason, self._derived
        )
        self._samples: Any = None  # the incremental table of this process
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
        self._save_files()

    def _save_files(self) -> None:
        """The recipe as it was resolved, beside W&B's own files; this program's sources, where the recipe asks."""
        run = self._run
        recipe = self._folder / CONFIG_FILE
        if run and recipe.exists():
            self._try_upload("the recipe", lambda: _save_copy(run, recipe))
        if run and self._config.track.wandb_code:
            name = f"{self._config.run.name}-code"
            self._try_upload("the code", lambda: run.log_code(str(PACKAGE_FOLDER), name=name), LOCAL_TIMEOUT_S)

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
            self._drop(f"W&B is dropped at step {step} ({_describe_wandb_error(error)}); training goes on, and {rest}")
        else:
            self._identity = replace(self._identity, through=max(step, self._identity.through))

    def log_histograms(self, step: int, layers: dict[str, LayerGradient]) -> None:
        """One of each layer's gradient."""
        if not self._takes_uploads(step):
            return

        def make() -> dict[str, Any]:
            import wandb

            return {
                HISTOGRAM_PREFIX + name: wandb.Histogram(np_histogram=(layer.counts, layer.edges))
                for name, layer in layers.items()
            }

        histograms = self._try_upload(f"the histograms of step {step}", make)
        if histograms:
            self.log(step, histograms)

    def log_samples(self, step: int, rows: list[list[Any]]) -> None:
        """[step, prompt, text] of all samples so far, into a table of which W&B is sent what is new.

        The first of a process has the past too, unless W&B knows that the run goes on: offline it does not.
        """
        if not self._takes_uploads(step):
            return
        run: Any = self._run

        def upload() -> None:
            import wandb

            if self._samples is None:
                self._samples = wandb.Table(columns=SAMPLE_COLUMNS, log_mode="INCREMENTAL")
                known = run.summary.get("samples")
                is_known = known is not None and known.get("_type") == "incremental-table-file"
                new = [row for row in rows if row[0] > self._last_known_step] if is_known else rows
            else:
                new = [row for row in rows if row[0] == step]
            for row in new:
                self._samples.add_data(*row)
            run.log({"samples": self._samples}, step=step)

        self._try_upload(f"the samples of step {step}", upload)

    def log_model(self, model: PublishedModel) -> None:
        """The checkpoint's model.safetensors and the run's tokenizer as an artifact, where the recipe wants one.

        Its aliases: step-N, latest, the phase that it ends, and best where no model before it had a lower validation
        loss.
        """
        step = model.step
        is_due = {
            "checkpoint": True, "phase": model.ends_phase, "end": step == self._plan.last_step, "none": False,
        }  # fmt: skip
        run = self._run
        if run is None or not self._uploads_enabled or not is_due[self._config.track.wandb_model]:
            return

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
        best_before = self._identity.best_model_loss
        is_best = model.validation_loss is not None and (best_before is None or model.validation_loss < best_before)
        if is_best:
            aliases.append("best")
        what = f"the model of step {step}"
        artifact = self._try_upload(what, copy, LOCAL_TIMEOUT_S)
        if artifact and self._try_upload(what, lambda: run.log_artifact(artifact, aliases=aliases)) and is_best:
            self._identity = replace(self._identity, best_model_loss=model.validation_loss)

    def write_log(self, text: str) -> None:
        """A line of the console or of rank 0's log, for W&B's Logs."""
        run = self._run
        if run and self._uploads_enabled:
            self._try_upload("a line of the log", lambda: run.write_logs(text))

    def finish(self, exit_code: int) -> None:
        """W&B learns the exit code; what it could not upload in time is said."""
        run = self._run
        if run is None:
            return
        self._run = None
        self._save_identity(open=False)
        upload_s = FINISH_TIMEOUT_S if self._uploads_enabled else 0  # after a failure nothing is waited for
        try:
            call_with_timeout(lambda: run.finish(exit_code=exit_code), upload_s + self._timeout_s)
            fault = _read_last_error(Path(run.settings.log_internal)) if run.settings.mode == "online" else None
        except Exception as error:
            fault = _describe_wandb_error(error)
        if fault:
            folder = Path(run.settings.sync_dir)
            self._say(f"WARNING: W&B may lack the last steps ({fault}); `wandb sync {folder}` uploads them")

    def _takes_uploads(self, step: int) -> bool:
        """Whether a table or histogram of this step still goes to W&B."""
        return self._run is not None and step > self._last_known_step and self._uploads_enabled

    def _try_upload(self, what: str, call: Callable[[], Value], seconds: float | None = None) -> Value | None:
        """Make or hand over a table, model or histograms; after the first that fails there are no more."""
        try:
            return call_with_timeout(call, seconds or self._timeout_s)
        except Exception as error:
            self._uploads_enabled = False
            self._say(
                f"WARNING: W&B did not accept {what} ({_describe_wandb_error(error)}): no more tables, histograms, "
                "logs and models go there until the next start; training and its curves go on"
            )
            return None

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
            self._drop(f"W&B is dropped ({_describe_wandb_error(error)}); training goes on without it")
            return None
        self._identity = replace(self._identity, through=max(last_sent or 0, self._identity.through))
        return last_sent

    def _save_identity(self, *, open: bool) -> None:
        """What wandb.json says, and whether this process gives W&B more: after a kill that still stands there."""
        self._identity = replace(self._identity, open=open)
        with contextlib.suppress(OSError):  # a full disk is said by what matters more
            self._identity.write(self._folder)


def _save_copy(run: Any, recipe: Path) -> None:
    """Give W&B a copy, in a folder of the run's name: it has a config.yaml of its own, and warns of what it links."""
    copy = Path(run.dir, recipe.parent.name, recipe.name)
    copy.parent.mkdir(exist_ok=True)
    shutil.copyfile(recipe, copy)
    run.save(str(copy), base_path=run.dir, policy="now", glob=False)


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


def _describe_wandb_error(error: BaseException) -> str:
    if isinstance(error, ValidationError):  # of a setting, whose first line says nothing
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return files.first_line(error) or type(error).__name__
