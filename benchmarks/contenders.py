"""Who is compared in benchmarks.time_to_loss: ours by optimizer and plan, and peers; each at several peak rates."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.launchers import Launcher, describe_peer_task, divide_rows, make_peer_launcher, make_smoltrain_launcher
from benchmarks.peers import PEERS, Peer, describe_peer_model
from benchmarks.real_rows import ROWS_FILE, VALIDATION_FILE
from smoltrain import files
from smoltrain.config.load import config_to_yaml, load_config
from smoltrain.config.rules import MUON_KEYS
from smoltrain.config.schema import Config, OptimizerSection
from smoltrain.errors import Problem, UserError, suggest_choice
from smoltrain.estimate.measure import RUN_NAME

KINDS: tuple[str, ...] = OptimizerSection.model_fields["kind"].annotation.__args__  # pyright: ignore
COMPARISON_FILE = "comparison.json"
SHARED = ("model", "tokenizer", "data", "batch", "engine", "optimizer", "phases", "evaluate")


@dataclass(frozen=True)
class Contender:
    """A trainer with a plan of so many steps; `launch` tells how it is started at a peak rate.

    Errors of `launch`: PeerUnavailable.
    """

    name: str
    steps: int
    rates: tuple[float, ...]
    launch: Callable[[float], Launcher]


def load_task(recipe: str, overrides: Sequence[str], steps: int, every: int, results: Path) -> Config:
    """The recipe with one phase, its first, over so many steps, evaluated so often and doing nothing beside.

    Errors: UserError.
    """
    asked = load_config(recipe, list(overrides)).phases[0]
    phase = f"phases.{asked.name}"
    words = [f"{phase}.{key}=null" for key in asked.horizon if key != "steps"]
    words += [
        f"{phase}.steps={steps}", f"{phase}.mix=null", f"run.name={RUN_NAME}", f"run.folder={results / 'dealt'}",
        "run.stop_after=null", "init.from=null", f"data.cache={results / 'tokens'}", "packing.document_mask=false",
        f"evaluate.every={every}", "sample.every=0", "checkpoint.every=0", "track.gradients_every=0",
        "track.wandb=off",
    ]  # fmt: skip
    config = load_config(recipe, [*overrides, *words])
    return config.model_copy(update={"phases": config.phases[:1]})


def set_plan(config: Config, rate: float, steps: int) -> Config:
    """The same with another peak rate and length; the rate ends at the same share of its peak, warm-up stays."""
    phase = config.phases[0]
    assert phase.lr is not None, "the first phase continues none"
    changed = {"lr": rate, "final_lr": rate * (phase.final_lr / phase.lr), "steps": steps}
    return config.model_copy(update={"phases": (phase.model_copy(update=changed),)})


def make_our_contender(config: Config, kind: str, steps: int, rates: Sequence[float], scratch: Path) -> Contender:
    """Ours with an optimizer of this kind; each recipe is written to the scratch folder."""

    def launch(rate: float) -> Launcher:
        planned = set_plan(_set_optimizer(config, kind), rate, steps)
        recipe = scratch / f"{kind}-{steps}-{rate:g}.yaml"
        recipe.write_text(config_to_yaml(planned), encoding="utf-8")
        return make_smoltrain_launcher(recipe, 1)

    whole = config.phases[0].num_steps
    name = f"smoltrain {kind}" if steps == whole else f"smoltrain {kind}, {steps} steps"
    return Contender(name, steps, tuple(rates), launch)


def _set_optimizer(config: Config, kind: str) -> Config:
    """The same with an optimizer of this kind, and without what means nothing to it."""
    changed: dict[str, Any] = {"kind": kind}
    if kind == "adamw":
        changed |= {key: OptimizerSection.model_fields[key].default for key in MUON_KEYS}
    return config.model_copy(update={"optimizer": config.optimizer.model_copy(update=changed)})


def make_peer_contender(
    name: str, peer: Peer, config: Config, micro_batch: int, rates: Sequence[float], results: Path
) -> Contender:
    """A peer, on the rows that were written to the results folder. Errors: UserError for the micro-batch."""
    steps = config.phases[0].num_steps
    accumulation = divide_rows(config.batch.rows(1), micro_batch, 1)

    def launch(rate: float) -> Launcher:
        task: dict[str, Any] = describe_peer_task(
            set_plan(config, rate, steps), steps, micro_batch, accumulation, results / ROWS_FILE,
            results / VALIDATION_FILE, config.evaluate.every,
        )  # fmt: skip
        return make_peer_launcher(peer, task | describe_peer_model(peer, config.model), 1)

    return Contender(name, steps, tuple(rates), launch)


def parse_kinds(names: str) -> list[str]:
    """The optimizers of a list like 'adamw,muon'. Errors: UserError."""
    kinds = [name.strip() for name in names.split(",") if name.strip()]
    wrong = [kind for kind in kinds if kind not in KINDS]
    if wrong:
        raise UserError(*[Problem("no such optimizer", kind, suggest_choice(kind, KINDS), "--ours") for kind in wrong])
    return kinds


def parse_rates(words: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Rates by trainer out of words like '1e-3,2e-3' and 'muon=4e-3'; those of "" are for all others.

    Errors: UserError.
    """
    rates: dict[str, tuple[float, ...]] = {}
    for word in words:
        name, _, numbers = word.rpartition("=")
        name = name.strip()
        if name and name not in (*KINDS, *PEERS):
            raise UserError(Problem("no such trainer", name, suggest_choice(name, (*KINDS, *PEERS)), "--rates"))
        try:
            found = {float(number) for number in numbers.split(",")}
        except ValueError:
            found = {0.0}
        if not all(0 < rate < 1 for rate in found):
            raise UserError(Problem("these are no rates", word, "numbers above 0 and below 1, as in 1e-3", "--rates"))
        rates[name] = tuple(sorted(found))
    return rates


def enter_results_folder(results: Path, comparison: dict[str, Any]) -> None:
    """Write down what is compared here, or see that it is the same as before, as far as both know it.

    Errors: UserError where the folder holds another comparison, whose runs would be mixed with these.
    """
    file = results / COMPARISON_FILE
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [key for key in comparison if key in before and before[key] != comparison[key]]
        if changed:
            what = "the results folder holds runs of another comparison"
            raise UserError(Problem(what, f"another {', '.join(changed)}", "a folder of its own", "--results"))
    files.write_json_file(file, comparison)


def describe_comparison(config: Config, micro_batch: int, rows: dict[str, str]) -> dict[str, Any]:
    """All that the runs of a comparison share, by key: without the places of files, and the phase at a peak of 1."""
    whole = set_plan(config, 1.0, config.phases[0].num_steps).model_dump(mode="json")
    whole["phases"] = whole["phases"][0]
    told = {f"{section}.{key}": value for section in SHARED for key, value in whole[section].items()}
    del told["optimizer.kind"], told["data.cache"]
    return told | {"the peers' micro-batch": micro_batch} | rows
