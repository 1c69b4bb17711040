"""A run as Weights & Biases keeps it: its mode, its history, tables and model artifacts. The only importer of wandb.

W&B must not cost a run. Every call of it is made by `bounded`, in a thread that is left behind when it takes too long,
and whatever it raises is said once: tables, histograms and models end with the first that fails, all of W&B with the
first step that cannot be handed over. metrics.jsonl has every step; the next start gives W&B from it what W&B lacks.
"""

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from smoltrain import files
from smoltrain.config.load import redacted_config
from smoltrain.config.schema import Config
from smoltrain.config.wandb_env import read_wandb_environment
from smoltrain.engine.layer_gradients import LayerGradient
from smoltrain.errors import DONE
from smoltrain.run.run_folder import RunFolder
from smoltrain.run.wandb_id import WandbIdentity, choose_wandb_identity, next_wandb_identity, read_logged_digests
from smoltrain.schedule import Plan

GRADIENT_HISTOGRAM_PREFIX = "gradients/histogram/"  # + layer: its entries
FINISH_TIMEOUT_S = 120.0  # for the last upload; what is left stays on disk for `wandb sync`
LOCAL_TIMEOUT_S = 120.0  # for what waits for this machine alone: a copy of the weights, steps read from metrics.jsonl
TRUE_WORDS = ("1", "on", "yes", "true")
START_TIMEOUT_S = 45.0  # for W&B's own process to start, beside the seconds that its server has

Value = TypeVar("Value")


def call_with_timeout(call: Callable[[], Value], seconds: float) -> Value:
    """What a call returns, as far as it does so in time. Errors: its own, and TimeoutError; it may then go on alone."""
    done: list[Value] = []
    failed: list[BaseException] = []

    def body() -> None:
        try:
            done.append(call())
        except BaseException as error:  # W&B also raises SystemExit
            failed.append(error)

    thread = threading.Thread(target=body, name="wandb", daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0] if isinstance(failed[0], Exception) else RuntimeError(repr(failed[0]))
    if not done:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return done[0]


class WandbRun:
    """What a run logs goes to W&B once for each step; where W&B is off or has failed, every call does nothing."""

    def __init__(self, config: Config, folder: RunFolder, first_step: int, say: Callable[[str], None]) -> None:
        """Start W&B as `config.track` asks, for a start that goes on after `first_step`; `say` takes warnings."""
        self._config, self._folder, self._say = config, folder.path, say
        self._timeout_s = config.track.wandb_timeout_s
        self._last_step = Plan(config.phases).last_step
        self._run: Any = None
        self._uploads_enabled = True  # tables, histograms and models
        self._mode = resolve_wandb_mode(config)
        self._start(choose_wandb_identity(config, folder, first_step), first_step)

    def _start(self, identity: WandbIdentity, first_step: int) -> None:
        """Begin or resume the run of W&B with this id, and give it the steps up to `first_step` that it lacks."""
        self._identity = identity
        self.description = self._open(*self._mode)  # (mode, why; id) for the console
        self._last_known_step = identity.through  # W&B takes back no step; those come out as they did before
        if self._run and self._run.settings.mode == "online":
            self._last_known_step = max(0, self._run.starting_step - 1)  # the server knows best
        self._rows = read_logged_digests(self._folder, identity) if self._run else {}
        self._save_identity(open=self._run is not None)
        if self._run and self._last_known_step < first_step:
            self._send_missing_steps(first_step)

    def log(self, step: int, values: dict[str, Any], rows: str = "") -> None:
        """Once for each step, however often it was done; `rows` is the digest of all rows up to it.

        A step that W&B has, and that now comes out with other rows, begins a new run with the past that both share.
        """
        if self._run and step <= self._last_known_step and rows and self._rows.get(step, rows) != rows:
            self._restart_under_next_id(step)
        run = self._run
        if run is None or step <= self._last_known_step:
            return
        try:
            call_with_timeout(lambda: run.log(values, step=step), self._timeout_s)
        except Exception as error:
            self._run = None
            self._save_identity(open=False)
            rest = "the next start gives W&B what it lacks, from metrics.jsonl"
            self._say(
                f"WARNING: W&B is dropped at step {step} ({_describe_wandb_error(error)}); training goes on, and {rest}"
            )
        else:
            self._identity = replace(self._identity, through=max(step, self._identity.through))

    def log_histograms(self, step: int, layers: dict[str, LayerGradient]) -> None:
        """One of each layer's gradient."""
        if self._run is None or step <= self._last_known_step or not self._uploads_enabled:
            return

        def make() -> dict[str, Any]:
            import wandb

            made = {name: wandb.Histogram(np_histogram=(g.counts, g.edges)) for name, g in layers.items()}
            return {GRADIENT_HISTOGRAM_PREFIX + name: histogram for name, histogram in made.items()}

        if histograms := self._try_upload(f"the histograms of step {step}", make):
            self.log(step, histograms)

    def log_samples(self, step: int, rows: list[list[Any]]) -> None:
        """A table of (step, prompt, text), all that were sampled so far."""
        run = self._run
        if run is None or step <= self._last_known_step or not self._uploads_enabled:
            return

        def upload() -> None:
            import wandb

            run.log({"samples": wandb.Table(columns=["step", "prompt", "text"], data=list(rows))}, step=step)

        self._try_upload(f"the samples of step {step}", upload)

    def log_model(self, step: int, weights: Path, *, ends_phase: bool) -> None:
        """The checkpoint's model.safetensors and the run's tokenizer as an artifact, where the recipe wants one."""
        due = {"checkpoint": True, "phase": ends_phase, "end": step == self._last_step, "none": False}
        run = self._run
        if run is None or not due[self._config.track.wandb_model] or not self._uploads_enabled:
            return

        def copy() -> Any:
            import wandb

            artifact = wandb.Artifact(f"{self._config.run.name}-model", type="model", metadata={"step": step})
            artifact.add_file(str(weights))
            artifact.add_dir(str(self._folder / "tokenizer"), name="tokenizer")
            artifact.add_file(str(self._folder / "config.yaml"))
            return artifact

        what = f"the model of step {step}"
        if artifact := self._try_upload(what, copy, LOCAL_TIMEOUT_S):
            self._try_upload(what, lambda: run.log_artifact(artifact, aliases=[f"step-{step}"]))

    def finish(self, exit_code: int) -> None:
        """W&B learns the exit code; what it could not upload in time is said."""
        run = self._run
        if run is None:
            return
        self._run = None
        self._save_identity(open=False)
        try:
            call_with_timeout(
                lambda: run.finish(exit_code=exit_code),
                (FINISH_TIMEOUT_S if self._uploads_enabled else 0) + self._timeout_s,
            )
            lost = _read_last_error(Path(run.settings.log_internal)) if run.settings.mode == "online" else ""
        except Exception as error:
            lost = _describe_wandb_error(error)
        if lost:
            where = Path(run.settings.sync_dir)
            self._say(f"WARNING: W&B may lack the last steps ({lost}); `wandb sync {where}` uploads them")

    def _restart_under_next_id(self, step: int) -> None:
        why = f"a new id: step {step} has come out with other rows than {self._identity.id} has of it"
        self.finish(DONE)
        self._start(next_wandb_identity(self._identity, self._folder, why), step - 1)
        self._say(f"{'W&B':<22} {self.description}")

    def _try_upload(self, what: str, call: Callable[[], Value], seconds: float | None = None) -> Value | None:
        """One table or model, or a part of it, or histograms; after the first that fails there are no more."""
        try:
            return call_with_timeout(call, seconds or self._timeout_s)
        except Exception as error:
            self._uploads_enabled = False
            self._say(
                f"WARNING: W&B took {what} not ({_describe_wandb_error(error)}): no more tables, histograms and "
                "models go there until the next start; training and its curves go on"
            )
            return None

    def _send_missing_steps(self, first_step: int) -> None:
        """Give W&B the steps that it lacks, from metrics.jsonl and with the times at which they were trained."""
        run, begin = self._run, self._last_known_step

        def tell() -> int:
            told = 0
            for step, values in _read_missing_steps(self._folder / "metrics.jsonl", begin, first_step):
                run.log(values, step=step)
                told = step
            return told

        try:
            told = call_with_timeout(tell, LOCAL_TIMEOUT_S)
        except Exception as error:
            self._run = None
            self._save_identity(open=False)
            self._say(f"WARNING: W&B is dropped ({_describe_wandb_error(error)}); training goes on without it")
            return
        if told:
            self._identity = replace(self._identity, through=max(told, self._identity.through))
            self.description += f"; steps {begin + 1} to {told}, which it lacked, come from metrics.jsonl"

    def _save_identity(self, *, open: bool) -> None:
        """What wandb.json says, and whether this process gives W&B more: after a kill that still stands there."""
        self._identity = replace(self._identity, open=open)
        with contextlib.suppress(OSError):  # a full disk is said by what matters more
            self._identity.write(self._folder)

    def _open(self, mode: str, reason: str) -> str:
        """Start W&B in this mode; online falls back to offline when the server does not answer in time."""
        if mode == "off":
            return f"off, {reason}"
        try:
            self._run = call_with_timeout(lambda: self._init_wandb(mode), self._timeout_s + START_TIMEOUT_S)
        except Exception as error:
            if mode == "offline":
                return f"off, W&B cannot write here ({_describe_wandb_error(error)})"
            import wandb

            with contextlib.suppress(Exception):
                call_with_timeout(wandb.teardown, self._timeout_s)  # its background process still holds the run id
            return self._open("offline", f"going online failed ({_describe_wandb_error(error)})")
        why = f", {self._identity.why}" if self._identity.why else ""
        return f"{mode}, {reason}; run id {self._identity.id}{why}{_describe_environment(self._config)}"

    def _init_wandb(self, mode: str) -> Any:
        import wandb

        track = self._config.track
        return wandb.init(
            project=track.wandb_project,
            entity=track.wandb_entity,
            id=self._identity.id,
            name=track.wandb_name or self._config.run.name,
            group=track.wandb_group,
            tags=track.wandb_tags or None,
            notes=track.wandb_notes,
            dir=str(self._folder),
            mode=mode,  # pyright: ignore[reportArgumentType]
            resume="allow",
            config=redacted_config(self._config),
            settings=wandb.Settings(
                init_timeout=track.wandb_timeout_s,
                finish_timeout=FINISH_TIMEOUT_S,
                finish_timeout_raises=True,
                console="off",
                silent=True,
            ),
        )


def resolve_wandb_mode(config: Config) -> tuple[str, str]:
    """(online | offline | off, reason), before anybody has asked the server; auto agrees with what wandb itself reads:
    its variables, its settings files, and credentials for the server that these name.
    """
    named = os.environ.get("WANDB_MODE", "").strip()
    if named:
        os.environ["WANDB_MODE"] = named.lower()  # wandb takes no other
    else:
        os.environ.pop("WANDB_MODE", None)  # wandb would not start
    if config.track.wandb != "auto":
        return config.track.wandb, "as track.wandb asks"
    if (disabled := os.environ.get("WANDB_DISABLED", "")).lower() in TRUE_WORDS:
        return "off", f"WANDB_DISABLED={disabled}"
    try:
        mode, server, source, has_key = _read_wandb_settings()
    except Exception as error:  # with which wandb would not start either
        return "off", f"W&B's own settings are wrong ({_describe_wandb_error(error)})"
    source = f"WANDB_MODE={named}" if named else source
    if mode == "disabled":
        return "off", source
    if mode in ("offline", "dryrun"):
        return "offline", source
    if not has_key:
        return "offline", f"no API key is configured{server} (`wandb login` sets one; `wandb sync` uploads later)"
    return "online", "an API key is configured" + (", the only writer of a shared run" if mode == "shared" else "")


def _read_wandb_settings() -> tuple[str, str, str, bool]:
    """(mode, ' for SERVER' if it is not the usual one, where the mode comes from, whether there is a key).

    Errors: those of wandb for settings that it refuses.
    """
    import wandb
    from wandb.sdk.lib import wbauth

    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    settings = wandb.Settings(silent=True, settings_system=str(folder / "settings"))
    settings.update_from_system_settings()
    files = ", ".join(str(path) for path in settings.read_system_settings().sources)
    settings.update_from_env_vars(dict(os.environ))
    key = settings.api_key or settings.identity_token_file or wbauth.read_netrc_auth(host=settings.base_url)
    server = "" if settings.base_url == wandb.Settings().base_url else f" for {settings.base_url}"
    return settings.mode, server, f"mode = {settings.mode} in {files}", bool(key)


def _describe_environment(config: Config) -> str:
    """Which keys come from the environment, and which variables the command line has beaten."""
    said = []
    for one in read_wandb_environment(config.track.model_dump(), os.environ):
        value = getattr(config.track, one.key)
        name = f"track.{one.key}={','.join(value) if isinstance(value, tuple) else value}"
        if one.key == "wandb":
            continue
        said.append(
            f"{name} by {one.variable}" if value == one.value else f"{name} by the command line, not by {one.variable}"
        )
        said += [one.note] if one.note else []
    return "".join(f"; {words}" for words in said)


def _read_missing_steps(path: Path, after: int, last: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(step, numbers) of metrics.jsonl behind `after`, up to `last`."""
    for values in files.read_jsonl(path, say=lambda _: None):  # the tracker says what is damaged
        step = values.pop("step")
        time_s = values.pop("time_s", None)
        if after < step <= last:
            numbers = {name: value for name, value in values.items() if not isinstance(value, str)}
            yield step, numbers | ({"_timestamp": time_s} if time_s else {})


def _read_last_error(log: Path) -> str:
    """The newest error in the log of W&B's own process, '' if there is none."""
    last = ""
    with contextlib.suppress(OSError):
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if str(record.get("level", "")).startswith("ERROR"):
                    last = str(record.get("msg", "")) + (f": {record['error']}" if record.get("error") else "")
    return last.partition("\n")[0]


def _describe_wandb_error(error: BaseException) -> str:
    if isinstance(error, ValidationError):  # of a setting, whose first line says nothing
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]
