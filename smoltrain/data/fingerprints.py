"""What the tokens of a run are a function of, as JSON; made at the first `prepare`, compared at every later one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smoltrain.data import hub, naming, sources
from smoltrain.data.tokenizer import Tokenizer
from smoltrain.errors import Problem, UserError
from smoltrain.schema import Config


def make(config: Config, given: Tokenizer | None) -> dict[str, Any]:
    """The fingerprint; asks the Hub for the commit of a dataset. `given` is any tokenizer but one to be trained.

    A trained BPE is itself a function of the sources and its size. Errors: those of `sources` and `hub`.
    """
    name, data = config.tokenizer.name, config.data
    tokenizer = {"name": name, "sha256": given.fingerprint()} if given else {"bpe": config.tokenizer.vocab_size}
    documents = sources.fingerprint(data) if data.hub is None else hub.fingerprint(data, hub.revision(data))
    return {"sources": documents, "tokenizer": tokenizer, **_settings(config)}


def check_same(made: dict[str, Any], config: Config, folder: Path) -> None:
    """Errors: UserError naming what in the config, or in the files that it names, is not what `folder` was made of."""
    before, now = dict(_leaves(made)), dict(_leaves(_again(config, made)))
    changed = [key for key in sorted(before | now) if before.get(key) != now.get(key)]
    if not changed:
        return
    saw, want = ([f"{key} = {_short(side.get(key))}" for key in changed[:3]] for side in (now, before))
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    change = f"run.name to prepare them for a new run; {folder} is left as it is"
    what = f"the run {config.run.name!r} was prepared from other data"
    raise UserError(Problem(what, ", ".join(saw) + more, ", ".join(want) + more, change))


def _again(config: Config, made: dict[str, Any]) -> dict[str, Any]:
    """The fingerprint as far as it can be had without the Hub, tiktoken or a package; the rest is as it was made.

    A local folder counts by what is in it, not by its name. Indexes of version 0.1 hold no name, and take any.
    """
    name, data, was = config.tokenizer.name, config.data, made["tokenizer"]
    if name == "bpe":
        tokenizer = {"bpe": config.tokenizer.vocab_size}
    elif naming.is_folder(name):
        tokenizer = {"name": was.get("name"), "sha256": naming.named(config.tokenizer).fingerprint()}
    elif "sha256" in was and "name" not in was:
        tokenizer = was
    else:
        tokenizer = {"name": name, "sha256": was.get("sha256")}
    commit = made["sources"].get("revision")
    documents = sources.fingerprint(data) if data.hub is None else hub.fingerprint(data, commit)
    return {"sources": documents, "tokenizer": tokenizer, **_settings(config)}


def _settings(config: Config) -> dict[str, Any]:
    """The part that stands in the config itself."""
    section = config.tokenizer
    return {"separator": section.separator, "pad": section.pad, "validation_share": config.data.validation_share}


def _leaves(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every path in a fingerprint and what stands there; a file is one such thing."""
    for key, value in tree.items():
        if isinstance(value, dict) and "bytes" not in value:
            yield from _leaves(value, f"{path}{key}/")
        else:
            yield f"{path}{key}", value


def _short(value: object) -> str:
    match value:
        case None:
            return "none"
        case {"bytes": size, "sha256": sha256}:
            return f"{size:,} bytes ({sha256[:8]})"
    return str(value)
