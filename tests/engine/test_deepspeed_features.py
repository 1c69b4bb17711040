"""What of DeepSpeed's JSON is refused, in words that say what there is instead."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from smoltrain.engine.deepspeed_features import DTYPE_NAMES, REFUSED_FEATURES, SECTIONS, TOP_KEYS, find_value
from smoltrain.engine.deepspeed_json import fill_deepspeed_config
from smoltrain.engine.reduction import why_not_once_per_step
from smoltrain.errors import UserError
from tests import tiny

ASKED = {
    "tensor_parallel.autotp_size": 2,
    "sequence_parallel_size": 2,
    "zero_optimization.offload_optimizer.device": "nvme",
    "zero_optimization.offload_param.device": "nvme",
    "zero_optimization.load_from_fp32_weights": False,
    "zero_optimization.zenflow": {"topk_ratio": 0.1},
}  # of any other it is true


def fill(folder: Path, tree: dict[str, Any]) -> dict[str, Any]:
    path = folder / "mine.json"
    path.write_text(json.dumps(tree))
    settings = tiny.load(folder, f"engine.ds_config={path}", "track.gradients_every=0")
    return fill_deepspeed_config(settings, precision="bf16", accumulation=2, world_size=1)


def with_value(key: str, value: Any) -> dict[str, Any]:
    """ZeRO-2 with a value at a dotted key."""
    tree: dict[str, Any] = {"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "fp32"}}
    tree["communication_data_type"] = "fp32"
    *parents, last = key.split(".")
    node = tree
    for part in parents:
        node = node.setdefault(part, {})
    node[last] = value
    return tree


@pytest.mark.parametrize("key", REFUSED_FEATURES)
def test_a_feature_is_refused_where_it_is_asked_for(tmp_path: Path, key: str) -> None:
    fine, want = REFUSED_FEATURES[key]
    asked = ASKED.get(key, True)
    with pytest.raises(UserError) as refused:
        fill(tmp_path, with_value(key, asked))
    (problem,) = refused.value.problems
    assert (problem.saw, problem.want) == (f"{key} = {asked!r}", want)
    for value in (*fine, None):
        assert find_value(fill(tmp_path, with_value(key, value)), key) == value


@pytest.mark.parametrize("key", SECTIONS)
def test_a_section_that_is_no_object_is_named(tmp_path: Path, key: str) -> None:
    for value in ("cpu", True, ["cpu"]):
        with pytest.raises(UserError) as refused:
            fill(tmp_path, with_value(key, value))
        (problem,) = refused.value.problems
        assert problem.what == "mine.json has a section that is no object"
        assert problem.saw == f"{key} = {value!r}"
    if key.startswith("zero_optimization."):
        assert why_not_once_per_step(fill(tmp_path, with_value(key, None))) is None


@pytest.mark.parametrize("key", ["data_types.grad_accum_dtype", "communication_data_type"])
def test_a_precision_has_one_name_in_both_keys(tmp_path: Path, key: str) -> None:
    for name, short in DTYPE_NAMES.items():
        assert find_value(fill(tmp_path, with_value(key, name)), key) == short
    assert why_not_once_per_step(fill(tmp_path, with_value(key, "float32"))) is None
    for name in ("auto", "fp64", True):
        with pytest.raises(UserError, match="a precision that DeepSpeed does not know") as refused:
            fill(tmp_path, with_value(key, name))
        assert f"saw {key} = {name!r}" in str(refused.value)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("gradient_cliping", "gradient_clipping"),
        ("zero_optimisation", "zero_optimization"),
        ("comms_loger", "comms_logger"),
    ],
)
def test_a_slip_in_a_key_is_told_what_it_is_near_to(tmp_path: Path, key: str, meant: str) -> None:
    with pytest.raises(UserError, match="a key that DeepSpeed does not read") as refused:
        fill(tmp_path, with_value(key, 1))
    assert (refused.value.problems[0].saw, refused.value.problems[0].want) == (key, meant)
    assert fill(tmp_path, with_value("note", "of another program"))["note"] == "of another program"


def test_the_keys_that_are_known_are_those_that_deepspeed_reads() -> None:
    """Each constant by which its runtime/config.py takes something out of the whole JSON, and each plain name."""
    spec = importlib.util.find_spec("deepspeed")
    assert spec is not None
    assert spec.submodule_search_locations
    runtime = Path(spec.submodule_search_locations[0]) / "runtime"
    constants = dict(re.findall(r'^([A-Z_]+) = "(\w+)"$', (runtime / "constants.py").read_text(), re.MULTILINE))
    source = (runtime / "config.py").read_text()
    reads = re.findall(r"get_scalar_param\(\s*param_dict, ([A-Z_]+)|param_dict\.get\(([A-Z_]+)", source)
    names = {constants[name] for pair in reads for name in pair if name in constants}
    names |= set(re.findall(r"param_dict\.get\([\"'](\w+)", source))
    assert len(names) >= 20
    assert names - set(TOP_KEYS) == set()
