"""What a tuning is going to train: the words of the command line as a grid of runs, each of them checked beforehand."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from smoltrain.checkpoint.manifest import step_folder
from smoltrain.config.keys import find_full_keys
from smoltrain.config.load import load_config
from smoltrain.config.schema import MAX_SEED, Config, PhaseSection
from smoltrain.distributed.world import choose_device
from smoltrain.errors import Problem, UserError
from smoltrain.estimate.horizon import resolve_config
from smoltrain.inference.find_run import ANY_MODEL, is_huggingface_folder, locate_run
from smoltrain.launch.supervisor import choose_num_ranks
from smoltrain.schedule import count_planned_steps
from smoltrain.terminal import show_activity
from smoltrain.training.preflight import check_recipe, check_start
from smoltrain.tune.grid import Axis, GridPoint, describe_point, is_axis_word, list_points, make_axis, make_lr_axis
from smoltrain.tune.run_trials import find_shared_cache
from smoltrain.tune.short_plan import scale_phase
from smoltrain.tune.trials import QUIET_WORDS, VALIDATIONS, Trial, make_trial, tuning_folder


@dataclass(frozen=True)
class Tuning:
    """A grid that can be trained: everything is checked, nothing has begun."""

    recipe: str
    base_words: list[str]  # the overrides that all runs share
    base: Config  # the recipe with these
    axes: tuple[Axis, ...]
    seeds: tuple[int, ...]
    phase: PhaseSection  # the first one as the recipe has it, in steps
    planned_steps: int | None  # of all phases; None where nobody has counted them
    trials: list[Trial]  # all points with the first seed, then with the next
    num_ranks: int
    device: torch.device
    recipes_own: GridPoint | None
    rows_per_step: set[int]  # more than one where settings differ in them
    scales_final_lr: bool

    @property
    def steps(self) -> tuple[int, ...]:
        """Of the runs, the fewest first: several where a phase in tokens meets settings that differ in their rows."""
        return tuple(sorted({trial.steps for trial in self.trials}))

    @property
    def folder(self) -> Path:
        """Of all runs."""
        return tuning_folder(self.base)


def plan_tuning(
    recipe: str, words: list[str], *, lr: str | None, steps: int | None, num_seeds: int, ranks: int | None
) -> Tuning:
    """Read and check everything. Errors: UserError."""
    base_words = [word for word in words if not is_axis_word(word)]
    base = _name_source_folder(load_config(recipe, [*QUIET_WORDS, *base_words]))
    first = base.phases[0]
    axes = _read_axes([word for word in words if is_axis_word(word)], lr, base)
    points = list_points(axes, num_seeds)
    configs = _load_points(recipe, base_words, points)
    seeds = tuple(range(base.run.seed, base.run.seed + num_seeds))
    if seeds[-1] > MAX_SEED:
        raise UserError(Problem("the last seed is too large", f"{seeds[-1]}", f"at most {MAX_SEED}", "run.seed"))
    device = choose_device(base.engine.device)
    num_ranks = choose_num_ranks(ranks, device.type)
    says_evaluate_every = "evaluate.every" in _expand_keys(base_words, base)
    with show_activity("looking at the recipe and its data"):
        cache = find_shared_cache(base)
        trials: list[Trial] = []
        for seed in seeds:
            for point, config in zip(points, configs, strict=True):
                phase = _resolve_first_phase(config, config.batch.rows(num_ranks))
                if steps is not None:
                    phase = scale_phase(phase, steps)
                every = math.ceil(phase.num_steps / VALIDATIONS)
                if says_evaluate_every:
                    every = base.evaluate.every or phase.num_steps  # never but at the end
                rows = config.batch.rows(num_ranks)
                trials.append(make_trial(point, config, phase, seed, rows, cache, every))
        for trial in trials[: len(points)]:
            _check_trial(trial, num_ranks)
    _check_distinct(trials)
    return Tuning(
        recipe=recipe, base_words=base_words, base=base, axes=tuple(axes), seeds=seeds,
        phase=_resolve_first_phase(base, base.batch.rows(num_ranks)), planned_steps=_count_steps(base, num_ranks),
        trials=trials, num_ranks=num_ranks, device=device,
        recipes_own=next((point for point, config in zip(points, configs, strict=True) if config == base), None),
        rows_per_step={config.batch.rows(num_ranks) for config in configs},
        scales_final_lr=lr is not None and first.final_lr > 0,
    )  # fmt: skip


def _read_axes(words: Sequence[str], lr: str | None, base: Config) -> list[Axis]:
    """The axes of the command line in order, --lr the last. Errors: UserError."""
    first = base.phases[0]
    axes: list[Axis] = []
    for key, word in zip(_expand_keys(words, base), words, strict=True):
        axes.append(make_axis(key, word.partition("=")[2], first))
    if lr is not None:
        axes.append(make_lr_axis(lr, first))
    return axes


def _load_points(recipe: str, base_words: list[str], points: Sequence[GridPoint]) -> list[Config]:
    """The recipe at each point of the grid. Errors: UserError with what is wrong at any, each once."""
    configs: list[Config] = []
    problems: dict[str, Problem] = {}
    for point in points:
        try:
            configs.append(_name_source_folder(load_config(recipe, [*QUIET_WORDS, *base_words, *point.words])))
        except UserError as error:
            problems |= {f"{problem.what} {problem.saw}": problem for problem in error.problems}
    if problems:
        raise UserError(*problems.values())
    return configs


def _name_source_folder(config: Config) -> Config:
    """The config with a run in init.from as its folder: from where the runs of a grid live, its name means none.

    Errors: UserError for a run that is not there, and for one that is to be gone on with behind its last step.
    """
    source = config.init.source
    if source is None:
        return config
    if config.init.load == "all":
        want = "weights, or no init.from"
        raise UserError(Problem("the runs of a grid begin at their first step", "init.load=all", want, "init.load"))
    if is_huggingface_folder(Path(source)):
        return config
    run, step = locate_run(source, config.run.folder, "init.from", ANY_MODEL)
    folder = run if step is None else step_folder(run / "checkpoints", step)
    return config.model_copy(update={"init": config.init.model_copy(update={"source": str(folder)})})


def _expand_keys(words: Sequence[str], base: Config) -> list[str]:
    """The keys of overrides, in full where they are short for one."""
    tree = base.model_dump(mode="json")
    keys: list[str] = []
    for word in words:
        key = word.partition("=")[0]
        full_keys = find_full_keys(key, tree)
        keys.append(full_keys[0] if len(full_keys) == 1 else key)
    return keys


def _resolve_first_phase(config: Config, rows_per_step: int) -> PhaseSection:
    """The first phase in steps. Errors: those of resolve_config, for epochs that nobody has counted."""
    alone = config.model_copy(update={"phases": config.phases[:1]})
    return resolve_config(alone, rows_per_step).phases[0]


def _count_steps(config: Config, num_ranks: int) -> int | None:
    """Steps of the recipe's whole plan; None where epochs are not counted yet."""
    try:
        return count_planned_steps(resolve_config(config, config.batch.rows(num_ranks)).phases)
    except UserError:
        return None


def _check_trial(trial: Trial, num_ranks: int) -> None:
    """Errors: UserError for whatever can be known before a process starts."""
    check_recipe(trial.config)
    check_start(trial.config, choose_device(trial.config.engine.device), num_ranks, trial.config.batch.rows(num_ranks))


def _check_distinct(trials: Sequence[Trial]) -> None:
    """Errors: UserError for two settings that are the very same run, as 1e-3 and 0.001 are."""
    by_folder: dict[str, Trial] = {}
    for trial in trials:
        digest = trial.config.run.name.rpartition("_")[2]
        other = by_folder.setdefault(digest, trial)
        if other is not trial:
            saw = f"{describe_point(other.point)} and {describe_point(trial.point)}"
            raise UserError(Problem("two settings are the same run", saw, "settings that differ", "the command line"))
