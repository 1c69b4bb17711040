"""Verbs that look at machines before a run: doctor, check-hosts."""

from typing import TYPE_CHECKING, Annotated

import typer

from smoltrain.cli.app import app
from smoltrain.cli.arguments import AtLeastOneRankOption, DefaultRecipeArgument, OverridesArgument, OverridesCommand
from smoltrain.errors import TrainingStopped, UserError

if TYPE_CHECKING:
    from smoltrain.config.schema import Config

JsonOption = Annotated[bool, typer.Option("--json", help="All findings as JSON, and nothing else, on stdout.")]


@app.command("doctor", cls=OverridesCommand, epilog="Example: smoltrain doctor quickstart run.folder=/data/runs")
def doctor_command(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="Also look at what this recipe needs.")] = None,
    overrides: OverridesArgument = None,
    *,
    ranks: AtLeastOneRankOption = None,
    as_json: JsonOption = False,
) -> None:
    """Look at this machine: what would keep a run from starting or slow it down, and what to do; 1 after a fault.

    Takes seconds, trains nothing, and asks only servers that the recipe would ask.
    """
    from smoltrain.config.load import load_config
    from smoltrain.doctor.machine import examine_machine

    config = None if recipe is None else load_config(recipe, overrides or [])
    raise typer.Exit(examine_machine(config, ranks, _check_recipe, as_json=as_json))


@app.command(
    "check-hosts",
    cls=OverridesCommand,
    epilog="Example: smoltrain check-hosts quickstart run.folder=/data/runs, started by torchrun on every machine "
    "(docs/clusters.md)",
)
def check_hosts_command(
    recipe: DefaultRecipeArgument = None, overrides: OverridesArgument = None, *, as_json: JsonOption = False
) -> None:
    """Look at the machines of a run together, started as its ranks are: sums, links, folder, clocks, versions.

    Names the machine that is not as the others.
    """
    from smoltrain.config.load import load_config, split_recipe_words
    from smoltrain.distributed.srun import adopt_srun_variables
    from smoltrain.launch.rank import say_error, say_lost_connection

    adopt_srun_variables()
    words = [word for word in (recipe, *(overrides or [])) if word is not None]
    try:
        from smoltrain.doctor.hosts import examine_hosts

        code = examine_hosts(load_config(*split_recipe_words(words)), as_json=as_json)
    except (UserError, TrainingStopped) as error:  # on every rank: one says it
        code = say_error(error)
    except RuntimeError as error:
        code = say_lost_connection(error)
    raise typer.Exit(code)


def _check_recipe(config: "Config") -> None:
    """Only when it is asked for: torch may be what is broken."""
    from smoltrain.training.preflight import check_recipe

    check_recipe(config)
