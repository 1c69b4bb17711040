"""Calls that typer refuses, in the one form of an error."""

from typing import Annotated

import pytest
import typer

from smoltrain import cli
from smoltrain.usage import VERBS_MEANT_BY, describe_unknown_verb, describe_wrong_call


def refuse(*words: str, epilog: str | None = None) -> str:
    """What is said of a call of a command `tool make` with NAME, --top-k, --greedy and -h."""
    app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})

    @app.command(epilog=epilog)
    def make(
        name: Annotated[str, typer.Argument(metavar="NAME", help="What it is called.")],
        top_k: Annotated[int, typer.Option(min=1)] = 3,
        *,
        greedy: Annotated[bool, typer.Option("--greedy")] = False,
    ) -> None:
        raise AssertionError(f"called with {name} {top_k} {greedy}")

    command = typer.main.get_command(app)
    with pytest.raises(typer.TyperException) as refused:
        command.main(list(words), prog_name="make", standalone_mode=False)
    return str(describe_wrong_call(refused.value))


CHANGE = "; change the command line; make --help has an example"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], f"make needs a NAME: saw none, want what it is called{CHANGE}"),
        (
            ["x", "--topk", "3"],
            f"make has no such option: saw '--topk', want '--top-k' (the nearest valid one){CHANGE}",
        ),
        (["x", "--zzz"], f"make has no such option: saw '--zzz', want one of --greedy, --help, --top-k{CHANGE}"),
        (["x", "--greek"], f"make has no such option: saw '--greek', want '--greedy' (the nearest valid one){CHANGE}"),
        (["x", "--seed"], f"make has no such option: saw '--seed', want one of --greedy, --help, --top-k{CHANGE}"),
        (["x", "-z"], f"make has no such option: saw '-z', want one of --greedy, --help, --top-k{CHANGE}"),
        (["x", "--top-k", "many"], f"--top-k is not valid: saw 'many', want a whole number{CHANGE}"),
        (["x", "--top-k", "0"], f"--top-k is not valid: saw '0', want greater than or equal to 1{CHANGE}"),
        (["x", "y"], f"make cannot be called like this: saw too many words: (y), want make [OPTIONS] {{NAME}}{CHANGE}"),
    ],
)
def test_a_wrong_call_is_one_line_with_the_nearest_right_one(words: list[str], line: str):
    assert refuse(*words) == line


def test_an_option_without_its_value_and_one_with_a_value_too_many():
    change = "; change the command line; the verb's --help has an example"  # which it was, typer does not say
    assert refuse("x", "--top-k") == f"--top-k needs a value: saw nothing behind it, want --top-k VALUE{change}"
    assert refuse("x", "--greedy=3") == f"--greedy takes no value: saw --greedy=..., want --greedy{change}"


def test_a_wrong_verb():
    line = "tool has no such verb: saw 'mkae', want 'make' (the nearest valid one); change the command line; "
    assert str(describe_unknown_verb("mkae", ["make", "break"], "tool")) == line + "tool --help lists them"
    assert describe_unknown_verb("help", ["heal"], "tool").want == "--help", "as `git help` is typed"


@pytest.mark.parametrize(
    ("word", "want"),
    [
        ("resume", "train"),
        ("ls", "runs"),
        ("sample", "generate or chat"),
        ("quickstart", "train quickstart"),
        ("my/own.yaml", "train my/own.yaml"),
        ("genrate", "'generate' (the nearest valid one)"),
        ("frobnicate", "one of chat, generate, runs, train"),
    ],
)
def test_a_word_that_is_no_verb_is_answered_by_what_it_means(word: str, want: str):
    verbs = ["train", "runs", "generate", "chat"]
    assert describe_unknown_verb(word, verbs, "tool", ["quickstart"]).want == want


def test_every_word_of_other_programs_means_verbs_that_there_are():
    verbs = {verb for verbs in cli.PANELS.values() for verb in verbs}
    assert {verb for meant in VERBS_MEANT_BY.values() for verb in meant} <= verbs
    assert not VERBS_MEANT_BY.keys() & verbs


def test_the_example_of_a_verb_answers_too_many_words_and_an_argument_needs_no_option():
    change = "; change the command line; make --help has an example"
    said = refuse("x", "y", epilog="Example: tool make it --top-k 3")
    assert said == (
        "make cannot be called like this: saw too many words: (y), want make [OPTIONS] {NAME}, as in tool make it "
        f"--top-k 3{change}"
    )
    said = refuse("--name", "x")
    assert said == f"make has no such option: saw '--name', want NAME as a plain word, without an option{change}"


def test_a_missing_option_is_named_as_it_is_typed():
    app = typer.Typer(add_completion=False)

    @app.command()
    def push(
        repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME of the Hub.")],
        *,
        params: Annotated[str, typer.Option(help="Parameters: 2M.")],
        tasks: Annotated[str, typer.Option(metavar="TASK,TASK", help="Tasks.")],
    ) -> None:
        raise AssertionError(repo, params, tasks)

    def refuse_push(*words: str) -> str:
        with pytest.raises(typer.TyperException) as refused:
            typer.main.get_command(app).main(list(words), prog_name="push", standalone_mode=False)
        return str(describe_wrong_call(refused.value)).partition("; change")[0]

    assert refuse_push() == "push needs a REPO: saw none, want OWNER/NAME of the Hub"
    assert refuse_push("x") == "push needs --params VALUE: saw none, want parameters: 2M"
    assert refuse_push("x", "--params", "1") == "push needs --tasks TASK,TASK: saw none, want tasks"
