"""How long a plan is: what a recipe says in tokens or epochs, resolved to steps; and every plan in all three.

A run resolves its phases once, at its start (training/start.py), by the rows per step that it began with: the world
that goes on with it later may be another one. `smoltrain show` and `smoltrain estimate` resolve as a run would that
begins.
"""

from pathlib import Path

from smoltrain.config.schema import Config
from smoltrain.data.tokens.index import DataIndex, data_index_file, read_data_index
from smoltrain.data.tokens.packing import count_rows
from smoltrain.errors import Problem, UserError
from smoltrain.schedule import Plan, resolve_horizons

COUNT_UNITS = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K"))


def resolve_config(config: Config, rows_per_step: int, data_folder: Path | None = None) -> Config:
    """The same with every phase in steps. `data_folder` is the run whose data were prepared; None: the config's own.

    Errors: UserError for epochs of data that have none (streams, mixes) or are not prepared yet, and those of
    `resolve_horizons`.
    """
    epoch_tokens = None
    if asks_for_epochs(config):
        check_epochs_are_countable(config)
        index = read_index(data_folder or config.run_folder)
        epoch_tokens = None if index is None else count_epoch_tokens(index, config.batch.sequence_length)
        if epoch_tokens is None:
            saw, want = "a stream, which has no last row", "steps or tokens, or data.mode=cached"
            if index is None:
                saw, want = "nothing prepared yet", "`smoltrain prepare data` with the same words, or steps or tokens"
            raise _epochs_error(config, saw, want)
    tokens_per_step = rows_per_step * config.batch.sequence_length
    return config.model_copy(update={"phases": resolve_horizons(config.phases, tokens_per_step, epoch_tokens)})


def asks_for_epochs(config: Config) -> bool:
    """Whether a phase cannot be resolved before the data are prepared."""
    return any(phase.epochs is not None for phase in config.phases)


def read_index(run: Path) -> DataIndex | None:
    """What a run's data were made of; None before they are prepared. Errors: UserError if the index is damaged."""
    file = data_index_file(run)
    return read_data_index(file) if file.exists() else None


def count_epoch_tokens(index: DataIndex, sequence_length: int) -> int | None:
    """Targets of all rows that there are; None of a stream, and of several sources, each with an epoch of its own."""
    sources = list(index.sources.values())
    if len(sources) > 1 or sources[0].train is None:
        return None
    return count_rows(sources[0].train.tokens, sequence_length) * sequence_length


def describe_plan(config: Config, rows_per_step: int, index: DataIndex | None) -> str:
    """Each phase in steps, tokens and epochs, in a line; epochs are left out where they are not known.

    What cannot be resolved yet stays as the recipe says it.
    """
    epoch_tokens = None if index is None else count_epoch_tokens(index, config.batch.sequence_length)
    try:
        phases = Plan(resolve_config(config, rows_per_step).phases).phases
    except UserError:
        return ", ".join(f"{phase.name} {format_horizon(phase.horizon)}" for phase in config.phases)
    texts = []
    for phase in phases:
        tokens = phase.spec.num_steps * rows_per_step * config.batch.sequence_length
        epochs = "" if epoch_tokens is None else f", {tokens / epoch_tokens:.3g} epochs"
        texts.append(f"{phase.name} {phase.first}-{phase.last} ({format_count(tokens)} tokens{epochs})")
    return ", ".join(texts)


def format_horizon(horizon: dict[str, int | float]) -> str:
    """400M tokens, 3 epochs, 160 steps: a phase's length as its recipe says it."""
    return ", ".join(f"{format_count(value)} {key}" for key, value in horizon.items())


def format_hours(hours: float) -> str:
    """In the largest unit of which it is more than one: 2.5 days, 14 minutes."""
    for unit, in_hours in (("days", 24.0), ("hours", 1.0), ("minutes", 1 / 60)):
        if hours > in_hours:
            return f"{_shorten(hours / in_hours)} {unit}"
    return f"{_shorten(3600 * hours)} seconds"


def _shorten(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def format_count(number: float) -> str:
    """Three digits and a unit, as in 327K, 20.5M or 1.5B; a smaller number as it is."""
    for unit, letter in COUNT_UNITS:
        if number >= 0.9995 * unit:
            scaled = number / unit
            return f"{scaled:.3g}{letter}" if scaled < 999.5 else f"{scaled:.0f}{letter}"
    return f"{number:.3g}"


def check_epochs_are_countable(config: Config) -> None:
    """Errors: UserError for data that are known to have no epochs, before anybody prepares them."""
    if len(config.data.parts) > 1:
        names = ", ".join(part.name for part in config.data.parts)
        raise _epochs_error(config, f"a mix of {names}, each with an epoch of its own", "steps or tokens")
    if config.data.mode == "stream":
        raise _epochs_error(config, "data.mode=stream, which has no last row", "steps or tokens, or data.mode=cached")


def _epochs_error(config: Config, saw: str, want: str) -> UserError:
    phase = next(phase for phase in config.phases if phase.epochs is not None)
    key = f"phases.{phase.name}.epochs"
    return UserError(Problem(f"nobody can say how many steps {key}={phase.epochs:g} are", saw, want, key))
