"""Calls that typer refuses, in the one form of an error."""

from typing import Annotated

import pytest
import typer

from smoltrain.usage import describe_unknown_verb, describe_wrong_call


def refuse(*words: str) -> str:
    """What is said of a call of a command `tool make` with NAME, --top-k, --greedy and -h."""
    app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})

    @app.command()
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
        (["x", "-z"], f"make has no such option: saw '-z', want one of --greedy, --help, --top-k{CHANGE}"),
        (["x", "--top-k", "many"], f"--top-k is not valid: saw 'many', want a whole number{CHANGE}"),
        (["x", "--top-k", "0"], f"--top-k is not valid: saw '0', want greater than or equal to 1{CHANGE}"),
        (["x", "y"], f"make cannot be called like this: saw too many words: (y), want make [OPTIONS] {{NAME}}{CHANGE}"),
    ],
)
def test_a_wrong_call_is_one_line_with_the_nearest_right_one(words: list[str], line: str):
    assert refuse(*words) == line


def test_an_option_without_its_value_and_one_with_a_value_too_many():
    change = "; change the command line; smoltrain --help has an example"  # typer does not say which verb it was
    assert refuse("x", "--top-k") == f"--top-k needs a value: saw nothing behind it, want --top-k VALUE{change}"
    assert refuse("x", "--greedy=3") == f"--greedy takes no value: saw --greedy=..., want --greedy{change}"


def test_a_wrong_verb():
    line = "tool has no such verb: saw 'mkae', want 'make' (the nearest valid one); change the command line; "
    assert str(describe_unknown_verb("mkae", ["make", "break"], "tool")) == line + "tool --help lists them"
    assert describe_unknown_verb("help", ["heal"], "tool").want == "--help", "as `git help` is typed"
