"""The verb `smoltrain profile`: real steps of a recipe, or of a run's recipe, and where their time goes."""

import tempfile
from pathlib import Path
from statistics import median

import torch

from smoltrain.config.load import list_recipes, load_config
from smoltrain.config.schema import Config, OwnModelSection
from smoltrain.distributed.memory_limits import find_rank_limit
from smoltrain.distributed.world import choose_device
from smoltrain.errors import Problem, UserError
from smoltrain.estimate.fitting import build_fitted_setup, find_least_recomputation, fit_config_to_memory
from smoltrain.estimate.horizon import resolve_config
from smoltrain.estimate.measure import measurement_overrides, train_measured
from smoltrain.estimate.training_setup import DeviceKind, TrainingSetup
from smoltrain.files import report_unwritable
from smoltrain.inference.find_run import find_run_folder
from smoltrain.profiling.report import (
    Profile,
    build_operator_table,
    build_step_table,
    describe_measurement,
    write_profile_advice,
)
from smoltrain.profiling.trace import find_step_parts, read_trace
from smoltrain.terminal import open_console, print_text, show_activity
from smoltrain.training.step_recorder import PROFILE_VARIABLE, ProfileRequest

WARM_UP = 5  # steps before those that are recorded: the first ones compile, the others tell the time without a profiler
COMPILING = 2  # of them


def profile_recipe(source: str, overrides: list[str], *, steps: int, ranks: int | None, trace: Path | None) -> Profile:
    """Train, record, print. Nothing is written but the trace: the steps have a run folder of their own, which goes.

    Errors: UserError for the recipe, its data and the trace's place; TrainingStopped where the steps fail.
    """
    console = open_console()
    recipe = find_profiled_recipe(source)
    named = load_config(recipe, overrides)
    ranks = ranks or torch.cuda.device_count() or 2  # as many as `smoltrain train` starts
    trace = trace or Path(f"profile-{named.run.name}.json.gz")
    if not trace.name.endswith(".json.gz"):
        raise UserError(Problem("the trace is gzip's", str(trace), "a name that ends in .json.gz", "--trace"))
    config, setup = _settle_config(named, ranks)
    print_text(
        f"profiling {recipe}: {WARM_UP + steps + 1} steps on {ranks} rank{'s' * (ranks > 1)} from fresh weights, in a "
        "temporary run folder; the run's own is not touched",
        console,
    )
    with tempfile.TemporaryDirectory() as scratch, show_activity("training some steps"):
        recorded = Path(scratch) / "trace.json.gz"
        request = ProfileRequest(WARM_UP + 1, WARM_UP + steps, str(recorded))
        compiles = [f"engine.compile={'on' if setup.compiled_update else 'off'}"]  # `auto` would find few steps too few
        words = [*overrides, *measurement_overrides(named, WARM_UP + steps + 1, Path(scratch)), *compiles]
        metrics = train_measured(recipe, words, ranks, Path(scratch), {PROFILE_VARIABLE: request.to_text()})
        parts = find_step_parts(read_trace(recorded))
        with report_unwritable("the trace", "a path that can be", "--trace"):
            trace.write_bytes(recorded.read_bytes())
    lines = [line for line in metrics if "speed/step_s" in line]
    plain = [line["speed/step_s"] for line in lines if COMPILING < line["step"] <= WARM_UP]
    profile = Profile(
        parts, steps, median(plain), max(line["memory/peak_gib"] for line in lines), ranks, config,
        is_compiled=setup.compiled_blocks, reduces_once=setup.once_per_step,
        least_recompute=find_least_recomputation(
            config, _memory_of_rank(setup.device, ranks), ranks, device=setup.device
        ),
    )  # fmt: skip
    console.print(build_step_table(profile))
    console.print(build_operator_table(profile))
    print_text(describe_measurement(profile), console)
    for line in write_profile_advice(profile):
        print_text(f"advice: {line}", console)
    print_text(f"the trace, for https://ui.perfetto.dev or chrome://tracing: {trace}", console)
    return profile


def find_profiled_recipe(source: str) -> str:
    """The recipe of a run that is there, by its folder or name; else a recipe. Errors: UserError for neither."""
    if source.endswith((".yaml", ".yml")):
        return source
    try:
        return str(find_run_folder(source) / "config.yaml")
    except UserError:
        if source in list_recipes():
            return source
        want = f"a run folder, the name of one under runs/, or a recipe: {', '.join(list_recipes())}"
        raise UserError(Problem("no such run or recipe", repr(source), want, "the first argument")) from None


def _settle_config(config: Config, ranks: int) -> tuple[Config, TrainingSetup]:
    """The config as the run would train it here, without any `auto`, and what that means."""
    if isinstance(config.model, OwnModelSection):
        want = "smoltrain's decoder, or a model of transformers"
        raise UserError(
            Problem("a model of a program's own cannot be profiled", config.model.class_name, want, "model")
        )
    device = choose_device(config.engine.device)
    kind: DeviceKind = "cuda" if device.type == "cuda" else "cpu"
    memory = _memory_of_rank(kind, ranks)
    config = resolve_config(config, config.batch.rows(ranks))
    config = fit_config_to_memory(config, memory, ranks, device=kind)
    setup = build_fitted_setup(config, memory, ranks, device=kind)
    return config, setup


def _memory_of_rank(kind: DeviceKind, ranks: int) -> float:
    if kind == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return find_rank_limit(ranks).num_bytes
