"""DeepSpeed's JSON and the recipe: one fills the other, and they never disagree in silence."""

import json
from pathlib import Path
from typing import Any

import pytest

from smoltrain.config.load import DS_CONFIGS_FOLDER
from smoltrain.config.schema import Config
from smoltrain.engine.deepspeed_json import RECIPE_KEYS, fill_deepspeed_config, zero_stage
from smoltrain.errors import UserError
from tests import tiny

SHIPPED = sorted(path.stem for path in DS_CONFIGS_FOLDER.glob("*.json"))
FACTS = {"precision": "bf16", "accumulation": 5, "world_size": 3}


@pytest.fixture
def settings(tmp_path: Path) -> Config:
    return tiny.load(tmp_path, "batch.micro_batch=7", "batch.accumulation=5", "optimizer.gradient_clipping=0.25")


def using(settings: Config, name: str | Path) -> Config:
    return settings.model_copy(update={"engine": settings.engine.model_copy(update={"ds_config": str(name)})})


def fill(settings: Config, **facts: Any) -> dict[str, Any]:
    return fill_deepspeed_config(settings, **(FACTS | facts))


def written(tmp_path: Path, tree: Any) -> Path:
    path = tmp_path / "mine.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree), encoding="utf-8")
    return path


def refusal(settings: Config, **facts: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        fill(settings, **facts)
    return caught.value


def owned(tree: dict[str, Any]) -> dict[str, Any]:
    """The values at the keys that the recipe owns."""
    found: dict[str, Any] = {}
    for key in RECIPE_KEYS:
        node: Any = tree
        for part in key.split("."):
            node = node.get(part, {}) if isinstance(node, dict) else {}
        if node != {}:
            found[key] = node
    return found


@pytest.mark.parametrize(
    ("name", "precision"),
    [(n, p) for n in SHIPPED for p in ("bf16", "fp16", "fp32") if (n, p) != ("zero0", "bf16")],  # refused, see below
)
def test_every_shipped_file_takes_the_recipes_values(settings: Config, name: str, precision: str) -> None:
    tree = fill(using(settings, name), precision=precision)
    values = owned(tree)
    assert "auto" not in values.values()
    assert values["train_micro_batch_size_per_gpu"] == 7
    assert values["gradient_accumulation_steps"] == 5
    assert values["train_batch_size"] == 7 * 5 * 3
    assert values["gradient_clipping"] == 0.25
    assert values.get("bf16.enabled", False) is (precision == "bf16")
    assert values.get("fp16.enabled", False) is (precision == "fp16")
    assert "auto" not in json.dumps(tree), "DeepSpeed itself knows no auto"


def test_the_shipped_files_differ_in_what_their_names_say() -> None:
    trees = {name: json.loads((DS_CONFIGS_FOLDER / f"{name}.json").read_text(encoding="utf-8")) for name in SHIPPED}
    assert {name: zero_stage(tree) for name, tree in trees.items()} == {
        "zero0": 0, "zero1": 1, "zero2": 2, "zero2_fp16": 2, "zero2_offload": 2, "zero3": 3,
    }  # fmt: skip
    assert [name for name, tree in trees.items() if "fp16" in tree] == ["zero2_fp16"]
    assert [name for name, tree in trees.items() if "offload_optimizer" in tree["zero_optimization"]] == [
        "zero2_offload"
    ]
    for name, tree in trees.items():
        assert set(owned(tree).values()) == {"auto"}, f"{name} must leave the recipe's keys to the recipe"
        if "bf16" in tree:
            assert tree["data_types"] == {"grad_accum_dtype": "fp32"}
            assert tree["communication_data_type"] == "fp32"


def test_filling_does_not_touch_the_file(settings: Config) -> None:
    before = {path: path.read_bytes() for path in DS_CONFIGS_FOLDER.glob("*.json")}
    fill(using(settings, "zero2"))
    assert before == {path: path.read_bytes() for path in DS_CONFIGS_FOLDER.glob("*.json")}


def test_a_path_works_and_may_repeat_the_recipe(settings: Config, tmp_path: Path) -> None:
    path = written(tmp_path, {"train_batch_size": 105, "gradient_clipping": 0.25, "zero_optimization": {"stage": 1}})
    tree = fill(using(settings, path))
    assert zero_stage(tree) == 1
    assert owned(tree)["train_micro_batch_size_per_gpu"] == 7
    assert owned(tree)["bf16.enabled"] is True


def test_a_shipped_file_is_found_by_its_path_outside_the_checkout_too(
    settings: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert zero_stage(fill(using(settings, "ds_configs/zero1.json"))) == 1
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs" / "zero1.json").write_text('{"zero_optimization": {"stage": 3}}', encoding="utf-8")
    assert zero_stage(fill(using(settings, "ds_configs/zero1.json"))) == 3, "a file of one's own there comes first"
    for name in ("ds_configs/zero9.json", "elsewhere/zero1.json", "ds_configs/zero1.yaml"):
        with pytest.raises(UserError, match="no such DeepSpeed config"):
            fill(using(settings, name))


def test_every_contradiction_is_named_at_once_on_both_sides(settings: Config, tmp_path: Path) -> None:
    contrary = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 6,
        "train_batch_size": 48,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": False},
        "fp16": {"enabled": True},
        "optimizer": {"type": "Lion"},
        "scheduler": {"type": "OneCycle"},
    }
    path = written(tmp_path, contrary)
    lines = str(refusal(using(settings, path))).splitlines()
    for key, recipe_key in RECIPE_KEYS.items():
        (line,) = [line for line in lines if f"saw {key} = " in line]
        assert f"{path} or {recipe_key}" in line
    assert "saw train_micro_batch_size_per_gpu = 8" in lines[0]
    assert "7 as batch.micro_batch gives" in lines[0]
    for section in ("optimizer", "scheduler"):
        assert (
            f"mine.json has a section that the recipe owns: saw {section}, want no such section; change {path}" in lines
        )
    assert sum("ZeRO-0 in bf16" in line for line in lines) == 1
    assert len(lines) == 9


def test_bf16_under_zero_0_is_refused(settings: Config) -> None:
    (problem,) = refusal(using(settings, "zero0")).problems
    assert problem.change == "engine.ds_config"
    assert "zero1" in problem.want


def test_an_unknown_name_gets_the_nearest(settings: Config) -> None:
    (problem,) = refusal(using(settings, "zreo2")).problems
    assert problem.saw == "'zreo2'"
    assert problem.want == "'zero2' (the nearest valid one), or a path to a JSON file"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "the DeepSpeed config is not JSON"),
        ('{"a": 1,}', "the DeepSpeed config is not JSON"),
        ("", "the DeepSpeed config is not JSON"),
        ("[1]", "the DeepSpeed config is not an object"),
        ('{"bf16": true}', "mine.json has no section where the recipe fills one"),
        ('{"zero_optimization": 2}', "mine.json has no ZeRO stage"),
        ('{"zero_optimization": {"stage": "auto"}}', "mine.json has no ZeRO stage"),
        ('{"zero_optimization": {"stage": 4}}', "mine.json has no ZeRO stage"),
    ],
)
def test_a_broken_file_is_a_readable_error(settings: Config, tmp_path: Path, text: str, what: str) -> None:
    path = written(tmp_path, text)
    problems = refusal(using(settings, path)).problems
    (problem,) = [p for p in problems if p.what == what]
    assert problem.change.startswith(str(path))


def test_the_recipe_keys_exist(settings: Config) -> None:
    tree = settings.model_dump()
    for key in RECIPE_KEYS.values():
        section, name = key.split(".")
        assert name in tree[section]


def test_gradients_are_not_logged_where_deepspeed_gives_them_under_other_names(settings: Config, tmp_path: Path):
    path = written(tmp_path, {"zero_optimization": {"stage": 2, "round_robin_gradients": True}})
    (problem,) = refusal(using(settings, path)).problems
    assert "under other parameters' names" in problem.what
    silent = settings.model_copy(update={"track": settings.track.model_copy(update={"gradients_every": 0})})
    assert fill(using(silent, path))["zero_optimization"]["round_robin_gradients"]
