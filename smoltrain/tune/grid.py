"""The grid of a tuning: which keys have which values, every combination of them, and what each is called.

Pure functions of words. An axis is a key with several values, `optimizer.kind=adamw,muon`: a comma parts them where it
stands outside of quotes and brackets. One value is a plain override.
"""

import hashlib
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from smoltrain.checkpoint.identity import FREE, KEY_RULES
from smoltrain.config.schema import HORIZON_KEYS, PhaseSection
from smoltrain.errors import Problem, UserError

MAX_RUNS = 1000
MAX_NAME_CHARS = 100  # of a run's folder, before its digest
QUOTES = "\"'"
ALIKE = "the losses could not be compared: they would be of other rows or other targets"
# Keys, or sections, that no runs of a grid may differ in -> why.
NO_AXES = {
    "run.seed": "--seeds N trains each setting with N seeds",
    "run": "it says where runs live, not how they learn",
    "data": ALIKE,
    "tokenizer": ALIKE,
    "packing": ALIKE,
    "evaluate": ALIKE,
    "batch.sequence_length": ALIKE,
}


@dataclass(frozen=True)
class Axis:
    """A key and the values that are tried for it."""

    key: str  # in full, as phases.main.lr
    values: tuple[str, ...]  # as they were typed
    words: tuple[tuple[str, ...], ...]  # for each value the overrides that set it


@dataclass(frozen=True)
class GridPoint:
    """One value of each axis."""

    settings: tuple[tuple[str, str], ...]  # (key, value as it was typed), axis by axis
    words: tuple[str, ...]  # the overrides that set them


def split_values(text: str) -> list[str]:
    """The values that commas part, outside of brackets, and of quotes with which a value begins."""
    values: list[str] = []
    depth = 0
    quote = ""
    start = 0
    for place, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in QUOTES and (depth or not text[start:place].strip()):
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth = max(0, depth - 1)
        elif character == "," and not depth:
            values.append(text[start:place])
            start = place + 1
    return [value.strip() for value in (*values, text[start:])]


def is_axis_word(word: str) -> bool:
    """Whether a word of the command line is a key with several values."""
    _, equals, text = word.partition("=")
    return bool(equals) and len(split_values(text)) > 1


def make_axis(key: str, text: str, phase: PhaseSection) -> Axis:
    """The axis of a full key, of a plan whose first phase this is. Errors: UserError for a key that can be none."""
    values = tuple(split_values(text))
    _check_values(key, values)
    reason = find_axis_fault(key, phase.name)
    if reason:
        want = f"one value ({reason}); a text with a comma in it stands in quotes"
        raise UserError(
            Problem(f"{key} cannot be an axis", f"{len(values)} values", want, f"{key} on the command line")
        )
    return Axis(key, values, tuple((f"{key}={value}",) for value in values))


def make_lr_axis(text: str, phase: PhaseSection) -> Axis:
    """The axis of --lr: peak rates of the first phase, each with a final_lr that is as far below it as the recipe's."""
    key = f"phases.{phase.name}.lr"
    values = tuple(split_values(text))
    _check_values("--lr", values)
    words: list[tuple[str, ...]] = []
    for value in values:
        final_lr = scale_final_lr(value, phase)
        final_word = () if final_lr is None else (f"phases.{phase.name}.final_lr={final_lr}",)
        words.append((f"{key}={value}", *final_word))
    return Axis(key, values, tuple(words))


def scale_final_lr(lr: str, phase: PhaseSection) -> str | None:
    """What final_lr is beside this peak, so that the schedule keeps its shape; None where there is nothing to scale."""
    try:
        peak = float(lr)
    except ValueError:  # which is refused where the recipe is read with it
        return None
    if not phase.final_lr or not phase.lr or not math.isfinite(peak):
        return None
    if peak == phase.lr:
        return repr(phase.final_lr)
    return f"{phase.final_lr * peak / phase.lr:.6g}"


def find_axis_fault(key: str, first_phase: str) -> str | None:
    """Why the runs of a grid may not differ in this key; None if they may, and for what is no key of a recipe."""
    section = key.partition(".")[0]
    name = key.rpartition(".")[2]
    if section == "phases":
        if not key.startswith(f"phases.{first_phase}."):
            return f"phase {first_phase} alone is trained"
        if name in (*HORIZON_KEYS, "name"):
            return "all runs are equally long: --steps N"
        return None
    for start, reason in NO_AXES.items():
        if key == start or key.startswith(f"{start}."):
            return reason
    if KEY_RULES.get(key) == FREE and section != "init":
        return "nothing that is learned depends on it"
    return None


def _check_values(key: str, values: tuple[str, ...]) -> None:
    """Errors: UserError for an empty value, and one that stands twice."""
    if "" in values:
        saw = ",".join(values) or "nothing"
        raise UserError(Problem(f"a value of {key} is empty", saw, "values between commas, as in 1e-3,2e-3", key))
    twice = sorted({value for value in values if values.count(value) > 1})
    if twice:
        raise UserError(Problem(f"{key} has a value twice", ", ".join(twice), "each value once", key))


def list_points(axes: Sequence[Axis], num_seeds: int) -> list[GridPoint]:
    """Every combination, the last axis first to change. Errors: UserError for one, and for more than anybody means."""
    if all(len(axis.values) == 1 for axis in axes):
        want = "--lr V1,V2,... or KEY=V1,V2,..., a key with several values"
        raise UserError(Problem("there is nothing to compare", "no key with several values", want, "the command line"))
    keys = [axis.key for axis in axes]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise UserError(Problem("a key is an axis twice", ", ".join(twice), "once", "the command line"))
    num_runs = num_seeds * math.prod(len(axis.values) for axis in axes)
    if num_runs > MAX_RUNS:
        saw = " x ".join([*(str(len(axis.values)) for axis in axes), f"{num_seeds} seeds"])
        what = "the grid has too many runs"
        raise UserError(Problem(what, f"{saw} = {num_runs:,}", f"at most {MAX_RUNS:,}", "the command line"))
    points: list[GridPoint] = []
    for places in itertools.product(*(range(len(axis.values)) for axis in axes)):
        chosen = list(zip(axes, places, strict=True))
        settings = tuple((axis.key, axis.values[place]) for axis, place in chosen)
        words = tuple(word for axis, place in chosen for word in axis.words[place])
        points.append(GridPoint(settings, words))
    return points


def shorten_keys(keys: Sequence[str]) -> dict[str, str]:
    """Full key -> its last part, or all of it where another key ends in the same."""
    last_parts = [key.rpartition(".")[2] for key in keys]
    return {key: last if last_parts.count(last) == 1 else key for key, last in zip(keys, last_parts, strict=True)}


def describe_point(point: GridPoint) -> str:
    """`lr 2e-3, kind muon`."""
    short = shorten_keys([key for key, _ in point.settings])
    return ", ".join(f"{short[key]} {value}" for key, value in point.settings)


def name_run(point: GridPoint, seed: int, content: str) -> str:
    """The name of a run's folder: its settings, its seed, and a digest of `content`, which is all that it is made of.

    Runs of another recipe or of other steps so never share a folder, and equal ones always do.
    """
    short = shorten_keys([key for key, _ in point.settings])
    parts = [f"{short[key]}-{value}" for key, value in point.settings]
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", "_".join([*parts, f"seed-{seed}"]))[:MAX_NAME_CHARS]
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    return f"{readable}_{digest}"
