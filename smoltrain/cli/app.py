"""The frame of the command: its panels of verbs, and how mistakes become readable lines and exit codes."""

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from smoltrain.console import find_stdout_fault, guard_console
from smoltrain.errors import (
    BAD_INPUT,
    DONE,
    FAULT,
    INTERRUPTED,
    TrainingStopped,
    UserError,
    format_error,
    problem_from_system,
)
from smoltrain.usage import describe_unknown_verb, describe_wrong_call
from smoltrain.version import VERSION

# The panels of `smoltrain --help` and their verbs, in order.
PANELS = {
    "Start a run": ("new", "train", "tune"),
    "Look before": ("recipes", "show", "explain", "estimate", "doctor", "check-hosts"),
    "Look meanwhile and after": ("runs", "watch", "summary", "plot", "report", "compare", "profile", "verify"),
    "Judge the model": ("perplexity", "eval", "memorisation"),
    "Take the model out": ("generate", "chat", "demo", "export", "push"),
    "Prepare ahead": ("prepare",),
}


class VerbGroup(TyperGroup):
    """A group of verbs: without one it prints its help, and a wrong one is answered with the nearest."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        panels = {verb: panel for panel, verbs in PANELS.items() for verb in verbs}
        order = [*panels, *self.commands]
        self.commands = {name: self.commands[name] for name in sorted(self.commands, key=order.index)}
        for name, command in self.commands.items():
            command.rich_help_panel = panels.get(name)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Help instead of a complaint where there is no word at all."""
        if not args and not ctx.resilient_parsing:
            print(ctx.get_help())
            raise typer.Exit()
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Errors: UserError for a word that is no verb; completion, which knows half a word yet, goes on."""
        if not ctx.resilient_parsing and args[0] not in self.commands:
            from smoltrain.config.load import list_recipes

            recipes = list_recipes() if "train" in self.commands else ()
            raise UserError(describe_unknown_verb(args[0], list(self.commands), ctx.command_path, recipes))
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="smoltrain",
    cls=VerbGroup,
    epilog="smoltrain VERB -h shows an example of each. smoltrain explain tells what every key of a recipe means.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def main(arguments: list[str] | None = None) -> None:
    """Run the command and exit."""
    run_app(app, arguments, "smoltrain")


def run_app(app: typer.Typer, arguments: list[str] | None = None, name: str | None = None) -> None:
    """Run a command and exit: a mistake of the user's ends with readable lines and a code, never a traceback.

    A verb that returns has printed what it was asked for: a stdout that did not take it is a fault. One that exits by
    itself has its own record of what it did, and its own code.
    `name` is how the command calls itself; by default as it was called.
    """
    if arguments is None:  # this is a process of its own
        guard_console()
    try:
        code = app(arguments, prog_name=name, standalone_mode=False)
        code = code if isinstance(code, int) else DONE
        fault = find_stdout_fault()
        if fault is not None:
            print(f"error: what was printed is lost: stdout cannot be written to ({fault})", file=sys.stderr)
            code = code or FAULT
        sys.exit(code)
    except typer.TyperException as error:
        print(format_error(UserError(describe_wrong_call(error))), file=sys.stderr)
        sys.exit(BAD_INPUT)
    except UserError as error:
        print(format_error(error), file=sys.stderr)
        sys.exit(BAD_INPUT)
    except OSError as error:
        problem = problem_from_system(error)
        if problem is None:
            raise
        print(format_error(UserError(problem)), file=sys.stderr)
        sys.exit(BAD_INPUT)
    except TrainingStopped as error:
        print(format_error(error), file=sys.stderr)
        sys.exit(FAULT)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _print_version(asked_for: bool) -> None:
    if asked_for:
        print(f"smoltrain {VERSION}")
        raise typer.Exit()


@app.callback()
def read_common_options(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Pretrains small language models on one to many GPUs."""
