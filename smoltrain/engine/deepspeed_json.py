"""DeepSpeed's JSON, filled from the recipe: "auto" takes the recipe's value, anything else must agree with it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smoltrain.config.load import DS_CONFIGS_FOLDER
from smoltrain.config.schema import Config
from smoltrain.engine.deepspeed_features import check_features, check_sections, check_spelling, name_dtypes
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

    Errors: UserError for an unknown file, a value that contradicts the recipe (both named), a section that
    is none or that the recipe owns, what smoltrain does in another way (deepspeed_features.py), bf16 under
    ZeRO-0, which DeepSpeed computes with another optimizer (docs/decisions.md), and what muon was not proven with.
    """
    path = _find_deepspeed_json(config.engine.ds_config)
    tree = _parse_deepspeed_json(read_deepspeed_text(config.engine.ds_config), path)
    problems = check_sections(tree, path)
    if problems:
        raise UserError(*problems)
    name_dtypes(tree)
    problems = _fill_recipe_values(tree, config, precision, accumulation, world_size, path)
    problems += _check_no_owned_sections(tree, path)
    problems += check_spelling(tree, path)
    problems += check_features(tree, path)
    problems += _check_zero_section(tree, config, precision, path)
    problems += _check_muon(tree, config)
    if problems:
        raise UserError(*problems)
    return tree


def _fill_recipe_values(
    tree: dict[str, Any], config: Config, precision: str | None, accumulation: int | None, world_size: int | None,
    path: Path,
) -> list[Problem]:  # fmt: skip
    """Put the recipe's values into `tree`; what the file says otherwise."""
    micro_batch: int | None = config.batch.micro_batch_rows
    if config.batch.micro_batch == "auto" and accumulation is None:
        micro_batch = None  # not chosen yet
    rows_per_step = None
    if micro_batch and accumulation and world_size:
        rows_per_step = micro_batch * accumulation * world_size
    values = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": rows_per_step,
        "gradient_clipping": config.optimizer.gradient_clipping,
        "bf16.enabled": None if precision is None else precision == "bf16",
        "fp16.enabled": None if precision is None else precision == "fp16",
    }
    problems = [_fill_or_compare(tree, key, value, path) for key, value in values.items() if value is not None]
    return [problem for problem in problems if problem]


def _check_no_owned_sections(tree: dict[str, Any], path: Path) -> list[Problem]:
    """The sections that stand in the recipe instead."""
    what = f"{path.name} has a section that the recipe owns"
    owned = [section for section in ("optimizer", "scheduler") if section in tree]
    return [Problem(what, saw=section, want="no such section", change=str(path)) for section in owned]


def _check_zero_section(tree: dict[str, Any], config: Config, precision: str | None, path: Path) -> list[Problem]:
    """What is wrong with zero_optimization: one problem at most."""
    zero = tree.get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
        saw = f"zero_optimization = {json.dumps(zero)}"
        return [Problem(f"{path.name} has no ZeRO stage", saw, want='{"stage": N} of 0 to 3', change=str(path))]
    if zero_stage(tree) == 0 and precision == "bf16":
        what = "ZeRO-0 in bf16 would not be the optimizer of the other stages"
        return [Problem(what, saw="stage 0 with bf16", want="zero1, or precision fp32", change="engine.ds_config")]
    if zero.get("round_robin_gradients") and config.track.gradients_every:
        # Seen in 0.19.8: its fp32 fragments are linked to the parameters in the order before they are distributed.
        what, want = "DeepSpeed gives gradients under other parameters' names", "track.gradients_every=0, or false"
        keys = "zero_optimization.round_robin_gradients or track.gradients_every"
        return [Problem(what, saw="round_robin_gradients = true", want=want, change=keys)]
    return []


def _check_muon(tree: dict[str, Any], config: Config) -> list[Problem]:
    """What of DeepSpeed would give muon other gradients than it expects, or keep them elsewhere."""
    if config.optimizer.kind != "muon":
        return []
    zero = tree.get("zero_optimization", {})
    refused = {
        "zero_optimization.offload_optimizer": isinstance(zero, dict) and offloads_optimizer(tree),
        "zero_optimization.offload_param": isinstance(zero, dict) and bool(zero.get("offload_param")),
    }
    what = "muon does not go with this part of the DeepSpeed config"
    want = "a config without it, as zero1, zero2 and zero3 are; or optimizer.kind=adamw"
    change = "engine.ds_config or optimizer.kind"
    return [Problem(what, key, want, change) for key, is_there in refused.items() if is_there]


def zero_stage(tree: Mapping[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed config."""
    return int(tree.get("zero_optimization", {}).get("stage", 0))


def with_zero_stage(tree: Mapping[str, Any], stage: int) -> dict[str, Any]:
    """A copy of a DeepSpeed config, with another ZeRO stage."""
    return {**tree, "zero_optimization": {**tree.get("zero_optimization", {}), "stage": stage}}


def config_precision(tree: Mapping[str, Any]) -> str:
    """The precision of weights and activations in a filled DeepSpeed config."""
    for precision in ("bf16", "fp16"):
        if tree.get(precision, {}).get("enabled"):
            return precision
    return "fp32"


def offloads_optimizer(tree: Mapping[str, Any]) -> bool:
    """Whether a DeepSpeed config keeps masters and optimizer state away from the device."""
    zero = tree.get("zero_optimization", {})
    offload = zero.get("offload_optimizer") or {}
    # A section without a device is none; cpu_offload is DeepSpeed's older key for the same.
    return offload.get("device", "none") != "none" or bool(zero.get("cpu_offload"))


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
