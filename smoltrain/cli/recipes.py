"""Verbs that look before a run: recipes, show, explain, estimate."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smoltrain.cli.app import app
from smoltrain.cli.arguments import DeviceOption, OverridesArgument, OverridesCommand, RecipeArgument, complete_key
from smoltrain.errors import Problem, UserError

if TYPE_CHECKING:
    from rich.table import Table

    from smoltrain.config.schema import Config
    from smoltrain.estimate.scaling import Scaling
    from smoltrain.schedule import Plan


@app.command("recipes", epilog="Example: smoltrain recipes")
def recipes_command() -> None:
    """List the shipped recipes."""
    from rich.table import Table

    from smoltrain.config.load import list_recipes, read_recipe_headline
    from smoltrain.terminal import open_console

    table = Table("recipe", "what it trains")
    for name, path in list_recipes().items():
        table.add_row(name, read_recipe_headline(path))
    open_console().print(table)


@app.command("show", cls=OverridesCommand, epilog="Example: smoltrain show quickstart phases.main.lr=1e-3 --plan")
def show_command(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    *,
    comments: Annotated[bool, typer.Option("--comments", help="With what each key means, as YAML comments.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="The phases and their learning rates instead.")] = False,
    png: Annotated[
        bool,
        typer.Option(
            "--png", help="Also draw the plan: into the .png file named behind it, else into ./NAME-plan.png."
        ),
    ] = False,
) -> None:
    """Print a recipe in full: every default, every override, the exact number of parameters; or what is wrong."""
    from smoltrain.config.commented_yaml import config_to_commented_yaml
    from smoltrain.config.load import config_to_yaml, load_config
    from smoltrain.estimate.horizon import resolve_config
    from smoltrain.training.preflight import check_recipe

    words = overrides or []
    picture = next((word for word in words if png and _is_picture(word)), None)
    resolved = load_config(recipe, [word for word in words if word != picture])
    check_recipe(resolved)
    if plan or png:
        resolved = resolve_config(resolved, resolved.batch.rows(1))
        _print_plan(resolved)
    else:
        text = config_to_commented_yaml(resolved) if comments else config_to_yaml(resolved)
        print(text + _format_config_facts(resolved))
    if png:
        _draw_plan(resolved, Path(picture or f"{resolved.run.name}-plan.png"))


@app.command(
    "estimate",
    cls=OverridesCommand,
    epilog="Example: smoltrain estimate smollm2-135m batch.micro_batch=8 --world 8 --device h100",
)
def estimate_command(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    *,
    world: Annotated[
        str, typer.Option(help="Ranks, each with one device: 8, a range as 8..1024, or a list as 8,12,64.")
    ] = "1",
    device: DeviceOption = "cpu",
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, help="Ranks of a node; by default 8 GPUs, or the fewest CPU ranks.")
    ] = None,
    within: Annotated[
        str | None, typer.Option(metavar="LINK", help="A rank's link within its node, as 450gbyte or 32gbyte,6us.")
    ] = None,
    between: Annotated[
        str | None, typer.Option(metavar="LINK", help="A node's link to the others, as 400gbit or 25gbit,50us.")
    ] = None,
    node_mtbf: Annotated[
        float | None, typer.Option(min=1e-3, metavar="HOURS", help="Mean time between failures of one node.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw tokens/s and efficiency of several worlds.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Train 20 real steps here, and correct the estimate by them.")
    ] = False,
) -> None:
    """Estimate memory, time and disk of a run before it starts, with alternatives and advice.

    Of several worlds: tokens/s, efficiency, where more ranks stop to pay, and what failures take.
    """
    from smoltrain.estimate.constants import NODE_MTBF_HOURS
    from smoltrain.estimate.estimate import EstimateWish, print_estimate
    from smoltrain.estimate.network import NetworkWish
    from smoltrain.estimate.scaling import parse_worlds

    worlds = parse_worlds(world)
    if plot and len(worlds) == 1:
        raise UserError(Problem("--plot draws several worlds", world, "a range as 8..1024", "--world"))
    network = NetworkWish(ranks_per_node, within, between)
    wish = EstimateWish(worlds, device, network, node_mtbf or NODE_MTBF_HOURS, measure)
    scaling = print_estimate(recipe, overrides or [], wish)
    if plot and scaling:
        _draw_scaling(scaling, plot)


@app.command("explain", epilog="Example: smoltrain explain phases.main.lr")
def explain_command(
    key: Annotated[
        str | None,
        typer.Argument(
            metavar="KEY|SECTION", help="As on the command line, or its last part.", autocompletion=complete_key
        ),
    ] = None,
) -> None:
    """Tell what the keys of a recipe mean: type, unit, default, the recipes' values; without a KEY, the sections."""
    from smoltrain.explain import explain

    columns = shutil.get_terminal_size().columns
    print(explain(key, min(max(columns, 40), 100)))


def _format_config_facts(config: "Config") -> str:
    """What follows from a config before any process starts, as YAML comments."""
    from smoltrain.data.documents.check_files import describe_missing_data
    from smoltrain.data.documents.listing import has_own_validation
    from smoltrain.engine.optimizer import OPTIMIZERS
    from smoltrain.model.build import build_model, count_parameters

    batch = config.batch
    ranks = "over all ranks" if batch.accumulation is None else "on each rank"
    rows = batch.rows(1)
    model = build_model(config.model, device="meta")
    facts = [
        f"{count_parameters(model):,} parameters",
        f"optimizer: {OPTIMIZERS[config.optimizer.kind].describe(model)}",
        _describe_horizon(config),
        f"{rows:,} rows = {rows * batch.sequence_length:,} tokens per step {ranks}",
    ]
    if all(has_own_validation(part) for part in config.data.parts):
        facts.append("data.validation_share holds nothing out: the documents to hold out are named")
    facts += [f"{missing}: a start here would be refused" for missing in describe_missing_data(config.data)]
    return "\n".join(f"# {fact}" for fact in facts)


def _describe_horizon(config: "Config") -> str:
    """The plan of one rank (of any number, with batch.rows_per_step) in steps, tokens and epochs."""
    from smoltrain.estimate.horizon import describe_plan, read_index

    ranks = "on one rank " if config.batch.rows_per_step is None else ""
    return f"plan {ranks}{describe_plan(config, config.batch.rows(1), read_index(config.run_folder))}"


def _is_picture(word: str) -> bool:
    """Whether a word is the PATH of `--png [PATH]`: typer has no options whose value may be left out."""
    return word.lower().endswith(".png") and "=" not in word


def _print_plan(config: "Config") -> None:
    from smoltrain.schedule import Plan
    from smoltrain.terminal import open_console

    console = open_console()
    factor = config.optimizer.embedding_lr_factor
    tables = "" if factor == 1 else f", embeddings and head at {factor:g} x lr"
    console.print(f"optimizer {config.optimizer.kind}{tables}")
    console.print(_describe_horizon(config))
    console.print(_build_plan_table(Plan(config.phases)))


def _draw_plan(config: "Config", path: Path) -> None:
    from smoltrain.run.plots import draw_plan
    from smoltrain.schedule import Plan

    plan = Plan(config.phases)
    try:
        draw_plan(plan, path, f"{config.run.name}: {plan.last_step:,} steps")
    except OSError as error:
        saw = f"{path} ({error.strerror})"
        raise UserError(Problem("the picture cannot be written", saw, "a path that can be", "--png")) from None
    print(path)


def _draw_scaling(scaling: "Scaling", path: Path) -> None:
    from smoltrain.run.scaling_plot import draw_scaling

    try:
        draw_scaling(scaling, path)
    except (OSError, ValueError) as error:  # the latter for an ending that matplotlib does not write
        saw = f"{path} ({error})"
        raise UserError(
            Problem("the picture cannot be written", saw, "a path that can be, as scaling.png", "--plot")
        ) from None
    print(path)


def _build_plan_table(plan: "Plan") -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from smoltrain.run.plots import steps_to_plot

    heads = ("phase", "steps", "schedule", "warm\nup", "lr at\nfirst", "\npeak", "\nlast")
    heads += ("weight\ndecay", "optim.\nstate")
    table = Table(*heads, box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    shown = steps_to_plot(plan)
    for phase in plan.phases:
        rates = [plan.lr(step) for step in shown if phase.first <= step <= phase.last]
        lrs = [f"{rate:.3g}" for rate in (rates[0], max(rates), rates[-1])]
        steps = f"{phase.first}..{phase.last}"
        spec = phase.spec
        decay = f"{spec.weight_decay:g}"
        table.add_row(phase.name, steps, spec.schedule, str(spec.warmup_steps), *lrs, decay, spec.optimizer_state)
    return table
