"""Whether a run goes to Weights & Biases, and how it is begun there: online, or at least offline.

`resolve_wandb_mode` says online, offline or off by what wandb itself would read; `connect_to_wandb` begins or resumes
the run, and never waits longer than `track.wandb_timeout_s` and START_TIMEOUT_S for it.
"""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from smoltrain.config.load import redacted_config
from smoltrain.config.schema import Config
from smoltrain.config.wandb_env import read_wandb_environment
from smoltrain.files import exception_title
from smoltrain.run.wandb_id import WandbIdentity
from smoltrain.timeout import call_with_timeout

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
START_TIMEOUT_S = 45.0  # for W&B's own process to start, beside the seconds that its server has
FINISH_TIMEOUT_S = 120.0  # for the last upload; what is left stays on disk for `wandb sync`
TRUE_WORDS = ("1", "on", "yes", "true")


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
        return "off", f"W&B's own settings are wrong ({describe_wandb_error(error)})"
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
            reason = f"going online failed ({describe_wandb_error(error)})"
            import wandb

            with contextlib.suppress(Exception):  # its background process still holds the run id
                call_with_timeout(wandb.teardown, config.track.wandb_timeout_s)
    if mode == "offline":
        try:
            run = call_with_timeout(lambda: _init_wandb(config, folder, identity.id, "offline", derived), seconds)
        except Exception as error:
            reason = f"W&B cannot write here ({describe_wandb_error(error)})"
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


def describe_wandb_error(error: BaseException) -> str:
    """What an error of wandb says, on one line."""
    if isinstance(error, ValidationError):  # of a setting, whose first line says nothing
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return exception_title(error)
