"""A command line that cannot be read, as a Problem: which word is wrong, and the nearest one that is right.

typer keeps the classes of its errors to itself, so they are known here by name and by what they hold.
"""

import difflib
from collections.abc import Collection, Iterable
from typing import Any

from smoltrain.errors import Problem, problem_from_pydantic

NEAR_VERB = 0.7  # of difflib's ratio: a slip of the keyboard; below it any word is near to some verb
NEAR_OPTION = 0.65  # which fewer are to be confused with
# Options of other verbs and programs -> the one that does this, of a verb that has it.
OPTIONS_MEANT_BY = {
    **dict.fromkeys(("ranks", "gpus", "world-size", "nproc"), "--world"),
    **dict.fromkeys(("length", "max-length", "num-tokens"), "--max-tokens"),
    "step": "--checkpoint",
}
# Words of other programs -> the verbs that do this here.
VERBS_MEANT_BY = {
    **dict.fromkeys(("resume", "continue", "restart", "start", "pretrain", "finetune", "fit"), ("train",)),
    **dict.fromkeys(("run",), ("train", "runs")),
    **dict.fromkeys(("list", "ls", "ps", "status"), ("runs",)),
    **dict.fromkeys(("log", "logs", "tail", "monitor"), ("watch", "summary")),
    **dict.fromkeys(("sample", "predict", "infer", "inference", "complete"), ("generate", "chat")),
    **dict.fromkeys(("convert", "save"), ("export",)),
    **dict.fromkeys(("upload", "publish"), ("push",)),
    **dict.fromkeys(("serve", "web", "ui"), ("demo",)),
    **dict.fromkeys(("config", "print", "cat"), ("show",)),
    **dict.fromkeys(("init", "create"), ("new",)),
    **dict.fromkeys(("sweep", "search", "hparams"), ("tune",)),
    **dict.fromkeys(("tokenize", "tokenise", "preprocess", "download"), ("prepare",)),
    **dict.fromkeys(("diff",), ("compare",)),
    **dict.fromkeys(("test", "benchmark", "validate"), ("eval", "perplexity", "verify")),
    **dict.fromkeys(("check", "diagnose"), ("doctor", "verify")),
    **dict.fromkeys(("info", "stats"), ("summary", "show")),
}


def describe_wrong_call(error: Any) -> Problem:
    """What typer refused (a TyperException), in smoltrain's own form."""
    context: Any = getattr(error, "ctx", None)  # BadOptionUsage has none
    command = context.command_path if context else "smoltrain"
    change = f"the command line; {command} --help has an example"
    match type(error).__name__:
        case "NoSuchOption":
            want = _suggest_option(error.option_name, context.command.get_params(context))
            return Problem(f"{command} has no such option", repr(error.option_name), want, change)
        case "MissingParameter":
            return Problem(f"{command} needs {_name_parameter(error.param)}", "none", _say_help(error.param), change)
        case "BadParameter":
            return _describe_bad_value(error, change)
        case "BadOptionUsage":
            option = error.option_name
            change = "the command line; the verb's --help has an example"  # which verb it was, typer does not say
            if "requires" in error.message:
                return Problem(f"{option} needs a value", "nothing behind it", f"{option} VALUE", change)
            return Problem(f"{option} takes no value", f"{option}=...", option, change)
    saw = error.message.rstrip(".").replace("Got unexpected extra argument(s)", "too many words:")
    usage = context.get_usage().removeprefix("Usage: ") if context else "a call as in its help"
    example = (getattr(context.command, "epilog", None) or "") if context else ""
    if example.startswith("Example: "):
        usage += f", as in {example.removeprefix('Example: ')}"
    return Problem(f"{command} cannot be called like this", saw, usage, change)


def describe_unknown_verb(word: str, verbs: list[str], command: str, recipes: Collection[str] = ()) -> Problem:
    """The first word is no verb of `command`; where it is a recipe, `train` was left out."""
    change = f"the command line; {command} --help lists them"
    near = difflib.get_close_matches(word, verbs, n=1, cutoff=NEAR_VERB)
    meant = [verb for verb in VERBS_MEANT_BY.get(word.lower(), ()) if verb in verbs]
    if word in ("help", "version"):
        want = f"--{word}"
    elif word in recipes or word.endswith((".yaml", ".yml")):
        want = f"train {word}"
    elif meant:
        want = " or ".join(meant)
    else:
        want = f"{near[0]!r} (the nearest valid one)" if near else "one of " + ", ".join(sorted(verbs))
    return Problem(f"{command} has no such verb", repr(word), want, change)


def _name_parameter(parameter: Any) -> str:
    """An option by its name and its value, as `--tasks TASK,TASK,...`; an argument by its metavar, as `a RUN`."""
    if parameter.param_type_name == "option":
        return " ".join([parameter.opts[0], parameter.metavar or "VALUE"])
    return f"a {parameter.display_name_raw}"


def _say_help(parameter: Any) -> str:
    """The help of a parameter as a part of a sentence: a word in capitals, such as OWNER/NAME, stays as it is."""
    text = str(parameter.help).rstrip(".")
    return text if text[1:2].isupper() else text[:1].lower() + text[1:]


def _suggest_option(word: str, parameters: Iterable[Any]) -> str:
    """The nearest option, compared without the dashes that all of them share; else all.

    What is an argument of the command needs no option: `--out FOLDER` is FOLDER alone.
    """
    known = list(parameters)
    arguments = {p.display_name_raw.lower().rstrip("."): p.display_name_raw for p in known if p not in _options(known)}
    if word.lstrip("-") in arguments:
        return f"{arguments[word.lstrip('-')]} as a plain word, without an option"
    options = {name for parameter in _options(known) for name in parameter.opts}
    by_name = {option.lstrip("-"): option for option in sorted(options) if option.startswith("--")}
    meant = OPTIONS_MEANT_BY.get(word.lstrip("-"))
    if meant is not None and meant in options:
        return meant
    close = difflib.get_close_matches(word.lstrip("-"), by_name, n=1, cutoff=NEAR_OPTION)
    return f"{by_name[close[0]]!r} (the nearest valid one)" if close else f"one of {', '.join(by_name.values())}"


def _options(parameters: Iterable[Any]) -> list[Any]:
    return [parameter for parameter in parameters if parameter.param_type_name == "option"]


def _describe_bad_value(error: Any, change: str) -> Problem:
    """A value that its option or argument does not take; pydantic's error behind it says which value that was."""
    key = error.param.opts[0] if error.param.param_type_name == "option" else error.param.display_name_raw
    if hasattr(error.__cause__, "errors"):
        (first, *_) = error.__cause__.errors()
        return problem_from_pydantic(key, first, change)
    return Problem(f"{key} is not valid", error.message.rstrip("."), "a value as in its help", change)
