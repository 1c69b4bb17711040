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

from smoltrain import files, wandb_env, wandb_id
from smoltrain.config import recorded
from smoltrain.errors import DONE
from smoltrain.gradients import LayerGradient
from smoltrain.plan import Plan
from smoltrain.runfolder import RunFolder
from smoltrain.schema import Config
from smoltrain.wandb_id import Identity

GRADIENT_HISTOGRAM = "gradients/histogram/"  # + layer: its entries
FINISH_S = 120.0  # for the last upload; what is left stays on disk for `wandb sync`
LOCAL_S = 120.0  # for what waits for this machine alone: a copy of the weights, steps read from metrics.jsonl
TRUE = ("1", "on", "yes", "true")
START_S = 45.0  # for W&B's own process to start, beside the seconds that its server has

Value = TypeVar("Value")


def bounded(call: Callable[[], Value], seconds: float) -> Value:
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
        self._answer_s = config.track.wandb_timeout_s
        self._last_step = Plan(config.phases).last_step
        self._run: Any = None
        self._uploads = True  # tables, histograms and models
        self._mode = wandb_mode(config)
        self._start(wandb_id.choose(config, folder, first_step), first_step)

    def _start(self, identity: Identity, first_step: int) -> None:
        """Begin or resume the run of W&B with this id, and give it the steps up to `first_step` that it lacks."""
        self._identity = identity
        self.words = self._open(*self._mode)  # (mode, why; id) for the console
        self._has_step = identity.through  # W&B takes back no step; those come out as they did before
        if self._run and self._run.settings.mode == "online":
            self._has_step = max(0, self._run.starting_step - 1)  # the server knows best
        self._rows = wandb_id.told_rows(self._folder, identity) if self._run else {}
        self._remember(open=self._run is not None)
        if self._run and self._has_step < first_step:
            self._catch_up(first_step)

    def log(self, step: int, values: dict[str, Any], rows: str = "") -> None:
        """Once for each step, however often it was done; `rows` is the digest of all rows up to it.

        A step that W&B has, and that now comes out with other rows, begins a new run with the past that both share.
        """
        if self._run and step <= self._has_step and rows and self._rows.get(step, rows) != rows:
            self._go_on_as_another(step)
        run = self._run
        if run is None or step <= self._has_step:
            return
        try:
            bounded(lambda: run.log(values, step=step), self._answer_s)
        except Exception as error:
            self._run = None
            self._remember(open=False)
            rest = "the next start gives W&B what it lacks, from metrics.jsonl"
            self._say(f"WARNING: W&B is dropped at step {step} ({_first_line(error)}); training goes on, and {rest}")
        else:
            self._identity = replace(self._identity, through=max(step, self._identity.through))

    def histograms(self, step: int, layers: dict[str, LayerGradient]) -> None:
        """One of each layer's gradient."""
        if self._run is None or step <= self._has_step or not self._uploads:
            return

        def make() -> dict[str, Any]:
            import wandb

            made = {name: wandb.Histogram(np_histogram=(g.counts, g.edges)) for name, g in layers.items()}
            return {GRADIENT_HISTOGRAM + name: histogram for name, histogram in made.items()}

        if histograms := self._upload(f"the histograms of step {step}", make):
            self.log(step, histograms)

    def samples(self, step: int, rows: list[list[Any]]) -> None:
        """A table of (step, prompt, text), all that were sampled so far."""
        run = self._run
        if run is None or step <= self._has_step or not self._uploads:
            return

        def upload() -> None:
            import wandb

            run.log({"samples": wandb.Table(columns=["step", "prompt", "text"], data=list(rows))}, step=step)

        self._upload(f"the samples of step {step}", upload)

    def model(self, step: int, weights: Path, *, ends_phase: bool) -> None:
        """The checkpoint's model.safetensors and the run's tokenizer as an artifact, where the recipe wants one."""
        due = {"checkpoint": True, "phase": ends_phase, "end": step == self._last_step, "none": False}
        run = self._run
        if run is None or not due[self._config.track.wandb_model] or not self._uploads:
            return

        def copy() -> Any:
            import wandb

            artifact = wandb.Artifact(f"{self._config.run.name}-model", type="model", metadata={"step": step})
            artifact.add_file(str(weights))
            artifact.add_dir(str(self._folder / "tokenizer"), name="tokenizer")
            artifact.add_file(str(self._folder / "config.yaml"))
            return artifact

        what = f"the model of step {step}"
        if artifact := self._upload(what, copy, LOCAL_S):
            self._upload(what, lambda: run.log_artifact(artifact, aliases=[f"step-{step}"]))

    def finish(self, exit_code: int) -> None:
        """W&B learns the exit code; what it could not upload in time is said."""
        run = self._run
        if run is None:
            return
        self._run = None
        self._remember(open=False)
        try:
            bounded(lambda: run.finish(exit_code=exit_code), (FINISH_S if self._uploads else 0) + self._answer_s)
            lost = _last_error(Path(run.settings.log_internal)) if run.settings.mode == "online" else ""
        except Exception as error:
            lost = _first_line(error)
        if lost:
            where = Path(run.settings.sync_dir)
            self._say(f"WARNING: W&B may lack the last steps ({lost}); `wandb sync {where}` uploads them")

    def _go_on_as_another(self, step: int) -> None:
        why = f"a new id: step {step} has come out with other rows than {self._identity.id} has of it"
        self.finish(DONE)
        self._start(wandb_id.another(self._identity, self._folder, why), step - 1)
        self._say(f"{'W&B':<22} {self.words}")

    def _upload(self, what: str, call: Callable[[], Value], seconds: float | None = None) -> Value | None:
        """One table or model, or a part of it, or histograms; after the first that fails there are no more."""
        try:
            return bounded(call, seconds or self._answer_s)
        except Exception as error:
            self._uploads = False
            self._say(
                f"WARNING: W&B took {what} not ({_first_line(error)}): no more tables, histograms and models go there "
                "until the next start; training and its curves go on"
            )
            return None

    def _catch_up(self, first_step: int) -> None:
        """Give W&B the steps that it lacks, from metrics.jsonl and with the times at which they were trained."""
        run, begin = self._run, self._has_step

        def tell() -> int:
            told = 0
            for step, values in _lines(self._folder / "metrics.jsonl", begin, first_step):
                run.log(values, step=step)
                told = step
            return told

        try:
            told = bounded(tell, LOCAL_S)
        except Exception as error:
            self._run = None
            self._remember(open=False)
            self._say(f"WARNING: W&B is dropped ({_first_line(error)}); training goes on without it")
            return
        if told:
            self._identity = replace(self._identity, through=max(told, self._identity.through))
            self.words += f"; steps {begin + 1} to {told}, which it lacked, come from metrics.jsonl"

    def _remember(self, *, open: bool) -> None:
        """What wandb.json says, and whether this process gives W&B more: after a kill that still stands there."""
        self._identity = replace(self._identity, open=open)
        with contextlib.suppress(OSError):  # a full disk is said by what matters more
            self._identity.write(self._folder)

    def _open(self, mode: str, reason: str) -> str:
        """Start W&B in this mode; online falls back to offline when the server does not answer in time."""
        if mode == "off":
            return f"off, {reason}"
        try:
            self._run = bounded(lambda: self._init(mode), self._answer_s + START_S)
        except Exception as error:
            if mode == "offline":
                return f"off, W&B cannot write here ({_first_line(error)})"
            import wandb

            with contextlib.suppress(Exception):
                bounded(wandb.teardown, self._answer_s)  # its background process still holds the run id
            return self._open("offline", f"going online failed ({_first_line(error)})")
        why = f", {self._identity.why}" if self._identity.why else ""
        return f"{mode}, {reason}; run id {self._identity.id}{why}{_from_environment(self._config)}"

    def _init(self, mode: str) -> Any:
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
            config=recorded(self._config),
            settings=wandb.Settings(
                init_timeout=track.wandb_timeout_s,
                finish_timeout=FINISH_S,
                finish_timeout_raises=True,
                console="off",
                silent=True,
            ),
        )


def wandb_mode(config: Config) -> tuple[str, str]:
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
    if (disabled := os.environ.get("WANDB_DISABLED", "")).lower() in TRUE:
        return "off", f"WANDB_DISABLED={disabled}"
    try:
        mode, server, source, has_key = _settings()
    except Exception as error:  # with which wandb would not start either
        return "off", f"W&B's own settings are wrong ({_first_line(error)})"
    source = f"WANDB_MODE={named}" if named else source
    if mode == "disabled":
        return "off", source
    if mode in ("offline", "dryrun"):
        return "offline", source
    if not has_key:
        return "offline", f"no API key is configured{server} (`wandb login` sets one; `wandb sync` uploads later)"
    return "online", "an API key is configured" + (", the only writer of a shared run" if mode == "shared" else "")


def _settings() -> tuple[str, str, str, bool]:
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


def _from_environment(config: Config) -> str:
    """Which keys come from the environment, and which variables the command line has beaten."""
    said = []
    for one in wandb_env.asked(config.track.model_dump(), os.environ):
        value = getattr(config.track, one.key)
        name = f"track.{one.key}={','.join(value) if isinstance(value, tuple) else value}"
        if one.key == "wandb":
            continue
        said.append(
            f"{name} by {one.variable}" if value == one.value else f"{name} by the command line, not by {one.variable}"
        )
        said += [one.note] if one.note else []
    return "".join(f"; {words}" for words in said)


def _lines(path: Path, after: int, last: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(step, numbers) of metrics.jsonl behind `after`, up to `last`."""
    for values in files.json_lines(path, say=lambda _: None):  # the tracker says what is damaged
        step = values.pop("step")
        time_s = values.pop("time_s", None)
        if after < step <= last:
            numbers = {name: value for name, value in values.items() if not isinstance(value, str)}
            yield step, numbers | ({"_timestamp": time_s} if time_s else {})


def _last_error(log: Path) -> str:
    """The newest error in the log of W&B's own process, '' if there is none."""
    last = ""
    with contextlib.suppress(OSError):
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if str(record.get("level", "")).startswith("ERROR"):
                    last = str(record.get("msg", "")) + (f": {record['error']}" if record.get("error") else "")
    return last.partition("\n")[0]


def _first_line(error: BaseException) -> str:
    if isinstance(error, ValidationError):  # of a setting, whose first line says nothing
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]
