"""DeepSpeed's JSON, filled from the recipe: "auto" takes the recipe's value, anything else must agree with it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from smoltrain.config.load import DS_CONFIGS_FOLDER
from smoltrain.config.schema import Config
from smoltrain.errors import Problem, UserError, suggest_choice

# The recipe's side of each value that DeepSpeed's JSON must leave "auto" or repeat.
RECIPE_KEYS = {
    "train_micro_batch_size_per_gpu": "batch.micro_batch",
    "gradient_accumulation_steps": "batch.accumulation",
    "train_batch_size": "batch.rows_per_step",
    "gradient_clipping": "optimizer.gradient_clipping",
    "bf16.enabled": "engine.precision",
    "fp16.enabled": "engine.precision",
}
_remembered_texts: dict[str, str] = {}  # of files that may be edited while a run is on, by name


def fill_deepspeed_config(
    config: Config, *, precision: str | None, accumulation: int | None, world_size: int | None
) -> dict[str, Any]:
    """The dict for deepspeed.initialize. What is None, as long as nobody knows it, is neither filled in nor compared.

    Errors: UserError for an unknown file, a value that contradicts the recipe (both named), a section that is none or
    that the recipe owns, and bf16 under ZeRO-0, which DeepSpeed computes with another optimizer (docs/decisions.md).
    """
    path = _find_deepspeed_json(config.engine.ds_config)
    tree = _parse_deepspeed_json(read_deepspeed_text(config.engine.ds_config), path)
    micro = None if config.batch.micro_batch == "auto" and accumulation is None else config.batch.micro_batch_rows
    whole = micro * accumulation * world_size if micro and accumulation and world_size else None
    wanted = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": whole,
        "gradient_clipping": config.optimizer.gradient_clipping,
        "bf16.enabled": precision and precision == "bf16",
        "fp16.enabled": precision and precision == "fp16",
    }
    problems = [_fill_or_compare(tree, key, value, path) for key, value in wanted.items() if value is not None]
    for section in ("optimizer", "scheduler"):
        if section in tree:
            problems.append(
                Problem(f"{path.name} has a section that the recipe owns", section, "no such section", str(path))
            )
    zero = tree.get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
        saw = f"zero_optimization = {json.dumps(zero)}"
        problems.append(Problem(f"{path.name} has no ZeRO stage", saw, '{"stage": N} of 0 to 3', str(path)))
    elif zero_stage(tree) == 0 and precision == "bf16":
        what = "ZeRO-0 in bf16 would not be the optimizer of the other stages"
        problems.append(Problem(what, "stage 0 with bf16", "zero1, or precision fp32", "engine.ds_config"))
    elif zero.get("round_robin_gradients") and config.track.gradients_every:
        # Seen in 0.19.8: its fp32 fragments are linked to the parameters in the order before the dealing.
        what, want = "DeepSpeed gives gradients under other parameters' names", "track.gradients_every=0, or false"
        keys = "zero_optimization.round_robin_gradients or track.gradients_every"
        problems.append(Problem(what, "round_robin_gradients = true", want, keys))
    if found := [p for p in problems if p]:
        raise UserError(*found)
    return tree


def zero_stage(tree: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed config."""
    return int(tree.get("zero_optimization", {}).get("stage", 0))


class GradientDtypes(NamedTuple):
    """The precision of gradients: where they add up, and where they travel."""

    accumulation: str
    reduction: str

    def __str__(self) -> str:
        return f"they add up in {self.accumulation} and travel in {self.reduction}"


def gradient_dtypes(tree: dict[str, Any], precision: str) -> GradientDtypes:
    """What the file says of gradients; DeepSpeed's default for both is the precision of the weights."""
    accumulation = tree.get("data_types", {}).get("grad_accum_dtype") or precision
    return GradientDtypes(accumulation, tree.get("communication_data_type") or precision)


def _find_deepspeed_json(name: str) -> Path:
    shipped = {path.stem: path for path in sorted(DS_CONFIGS_FOLDER.glob("*.json"))}
    if name in shipped:
        return shipped[name]
    path = Path(name)
    if path.is_file():
        return path
    packed = DS_CONFIGS_FOLDER / path.name
    if path == Path(DS_CONFIGS_FOLDER.name, path.name) and packed.is_file():
        return packed  # outside the checkout no folder ds_configs/ lies; the same words find what is shipped
    want = suggest_choice(name, shipped) + ", or a path to a JSON file"
    raise UserError(Problem("no such DeepSpeed config", repr(name), want, "engine.ds_config"))


def read_deepspeed_text(name: str) -> str:
    """The JSON that engine.ds_config names; what is remembered of it, if anything is. Errors: UserError."""
    if name in _remembered_texts:
        return _remembered_texts[name]
    path = _find_deepspeed_json(name)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(Problem("the DeepSpeed config is not JSON", str(error), "valid JSON", str(path))) from None


def remember_deepspeed_text(name: str, text: str) -> None:
    """This is what the file said when the run's command began, whatever it says by now."""
    _remembered_texts[name] = text


def _parse_deepspeed_json(text: str, path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(Problem("the DeepSpeed config is not JSON", str(error), "valid JSON", str(path))) from None
    if not isinstance(tree, dict):
        raise UserError(Problem("the DeepSpeed config is not an object", type(tree).__name__, "an object", str(path)))
    return tree


def _fill_or_compare(tree: dict[str, Any], key: str, value: Any, path: Path) -> Problem | None:
    """Put the recipe's value where the JSON says "auto"; a missing key is filled too, but for off switches."""
    *parents, last = key.split(".")
    node = tree
    for part in parents:
        if part not in node and value is False:
            return None
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            what = f"{path.name} has no section where the recipe fills one"
            return Problem(what, f"{part} = {node!r}", f'{{"{last}": "auto"}}', str(path))
    seen = node.get(last, "auto")
    if seen == "auto":
        node[last] = value
    elif seen != value:
        recipe_key = RECIPE_KEYS[key]
        what = f"{path.name} contradicts the recipe"
        return Problem(
            what, f"{key} = {seen!r}", f'"auto", or {value!r} as {recipe_key} gives', f"{path} or {recipe_key}"
        )
    return None
