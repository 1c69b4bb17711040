"""A command line that cannot be read, as a Problem: which word is wrong, and the nearest one that is right.

typer keeps the classes of its errors to itself, so they are known here by name and by what they hold.
"""

import difflib
from collections.abc import Iterable
from typing import Any

from smoltrain.errors import Problem, problem_from_pydantic, suggest_choice


def describe_wrong_call(error: Any) -> Problem:
    """What typer refused (a TyperException), in smoltrain's own form."""
    context: Any = getattr(error, "ctx", None)  # BadOptionUsage has none
    command = context.command_path if context else "smoltrain"
    change = f"the command line; {command} --help has an example"
    match type(error).__name__:
        case "NoSuchOption":
            options = {name for parameter in context.command.get_params(context) for name in parameter.opts}
            want = _suggest_option(error.option_name, options)
            return Problem(f"{command} has no such option", repr(error.option_name), want, change)
        case "MissingParameter":
            help_text = str(error.param.help).rstrip(".")
            want = help_text[:1].lower() + help_text[1:]
            return Problem(f"{command} needs a {error.param.display_name_raw}", "none", want, change)
        case "BadParameter":
            return _describe_bad_value(error, change)
        case "BadOptionUsage":
            option = error.option_name
            if "requires" in error.message:
                return Problem(f"{option} needs a value", "nothing behind it", f"{option} VALUE", change)
            return Problem(f"{option} takes no value", f"{option}=...", option, change)
    saw = error.message.rstrip(".").replace("Got unexpected extra argument(s)", "too many words:")
    usage = context.get_usage().removeprefix("Usage: ") if context else "a call as in its help"
    return Problem(f"{command} cannot be called like this", saw, usage, change)


def describe_unknown_verb(word: str, verbs: list[str], command: str) -> Problem:
    """The first word is no verb of `command`."""
    change = f"the command line; {command} --help lists them"
    want = f"--{word}" if word in ("help", "version") else suggest_choice(word, verbs)
    return Problem(f"{command} has no such verb", repr(word), want, change)


def _suggest_option(word: str, options: Iterable[str]) -> str:
    """The nearest option, compared without the dashes that all of them share; else all."""
    by_name = {option.lstrip("-"): option for option in sorted(options) if option.startswith("--")}
    close = difflib.get_close_matches(word.lstrip("-"), by_name, n=1, cutoff=0.5)
    return f"{by_name[close[0]]!r} (the nearest valid one)" if close else f"one of {', '.join(by_name.values())}"


def _describe_bad_value(error: Any, change: str) -> Problem:
    """A value that its option or argument does not take; pydantic's error behind it says which value that was."""
    key = error.param.opts[0] if error.param.param_type_name == "option" else error.param.display_name_raw
    if hasattr(error.__cause__, "errors"):
        (first, *_) = error.__cause__.errors()
        return problem_from_pydantic(key, first, change)
    return Problem(f"{key} is not valid", error.message.rstrip("."), "a value as in its help", change)
