"""Values of a program as overrides: the same config as from the command line, whatever characters are in a text."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smoltrain.config.load import load_config
from smoltrain.config.override_text import format_overrides
from smoltrain.errors import UserError


def test_mappings_become_a_text_for_each_key() -> None:
    sections = {"run": {"seed": 1, "name": "first"}, "phases": {"main": {"lr": 1e-3}}, "model": {"config": {}}}
    expected = ["phases.main.steps=20", "run.seed=1", "run.name=first", "phases.main.lr=0.001", "model.config={}"]
    assert format_overrides({"phases.main.steps": 20}, sections) == expected
    assert format_overrides(["run.seed=1"], {"run": {"name": "x"}}) == ["run.seed=1", "run.name=x"]


def test_the_config_is_that_of_the_command_line() -> None:
    words = ["phases.main.steps=20", "run.seed=1", "data.validation_share=0.1", "sample.prompts=[a, 'b: c']"]
    sections: dict[str, Any] = {"data": {"validation_share": np.float32(0.5) / 5}, "sample": {"prompts": ("a", "b: c")}}
    sections["data"]["validation_share"] = 0.1
    ours = load_config("quickstart", {"phases.main.steps": np.int64(20)}, run={"seed": 1}, **sections)
    assert ours == load_config("quickstart", words)


@pytest.mark.parametrize("text", ["null", "~", "[x", "{a: b}", '"quoted"', "a # b: c", "1e4", "true", "\u2028 \x85ü"])
def test_a_text_stays_the_text_that_it_is(text: str) -> None:
    assert load_config("quickstart", track={"wandb_notes": text}).track.wandb_notes == text
    assert load_config("quickstart", track={"wandb_tags": [text]}).track.wandb_tags == (text,)


def test_none_true_and_paths(tmp_path: Path) -> None:
    config = load_config(
        "quickstart", {"track.wandb_notes": None, "packing.document_mask": True}, run={"folder": tmp_path}
    )
    assert (config.track.wandb_notes, config.packing.document_mask) == (None, True)
    assert config.run.folder == tmp_path


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"phases.main.steps": object()}, "phases.main.steps cannot have such a value"),
        ({"sample.prompts": [b"x"]}, "sample.prompts cannot have such a value: saw b'x'"),
        ({1: 2}, "a key is no text: saw 1"),
        ("phases.main.steps=1", "overrides are not a list"),
        (None, "overrides are not a list"),
        ([3], "an override is no text: saw 3, want section.key=value"),
        ({"phases.main.stepz": 1}, "unknown key phases.main.stepz"),
    ],
)
def test_what_no_recipe_can_hold_is_the_users_to_read(overrides: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config("quickstart", overrides)
    assert said in str(caught.value)
