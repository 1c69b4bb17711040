"""Every undocumented name of DeepSpeed that smoltrain depends on: one that goes is named before anything trains."""

import ast
import importlib
import inspect
import sys
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any

import pytest

from smoltrain.errors import BAD_INPUT, UserError
from tests.zygote import zygote

ENGINE = Path(__file__).parents[2] / "smoltrain" / "engine"


@pytest.fixture(scope="module")
def private() -> Any:
    from smoltrain.engine import deepspeed_private

    return deepspeed_private


def renamed(value: Any, name: str) -> Any:
    """Code, or a constant of it, in which every use of `name` has another name."""
    if isinstance(value, str):
        return f"{name}_renamed" if value == name else value
    if isinstance(value, tuple):
        return tuple(renamed(part, name) for part in value)
    if isinstance(value, CodeType):
        return value.replace(co_names=renamed(value.co_names, name), co_consts=renamed(value.co_consts, name))
    return value


def break_name(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if another version called it something else."""
    if inspect.isfunction(owner):
        function = inspect.unwrap(owner)
        monkeypatch.setattr(function, "__code__", renamed(function.__code__, name))
        return
    if hasattr(owner, name):
        holder = next(c for c in owner.__mro__ if name in vars(c)) if inspect.isclass(owner) else owner
        monkeypatch.delattr(holder, name)
    if name in inspect.get_annotations(owner):
        monkeypatch.delitem(owner.__annotations__, name)


def test_a_name_that_is_gone_is_one_readable_error(private: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    private.check_private_names()
    names = private.list_private_names()
    assert len(names) > 40
    for owner, name in names:
        with monkeypatch.context() as patch:
            break_name(private.find_owner(owner), name, patch)
            with pytest.raises(UserError) as caught:
                private.check_private_names()
        (problem,) = caught.value.problems
        assert f"no {name} in {owner}" in problem.saw
        assert "0.19.8" in problem.want
        assert problem.change == "the environment: pip install deepspeed==0.19.8"
    private.check_private_names()


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("deepspeed.comm.torch", "build_shm_op"),  # a build of a minute
        ("deepspeed.runtime.engine:DeepSpeedEngine", "_copy_recovery_script"),  # a script that unpickles anything
        ("DeepSpeedZeroOptimizer.create_gradient_handling_hooks", "_grad_acc_hooks"),  # gradients reduced twice
        ("deepspeed.launcher.runner:main", "deepspeed.launcher.launch"),  # ranks that outlive their launcher
    ],
)
def test_what_would_break_in_silence_is_in_the_list(private: Any, owner: str, name: str) -> None:
    assert any(found.owner.endswith(owner) and found.name == name for found in private.list_private_names())


def test_the_build_is_put_aside(private: Any) -> None:
    assert private.find_owner("deepspeed.comm.torch").build_shm_op() is None


def test_an_owner_that_is_gone_is_the_same_error(private: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(private.PRIVATE_NAMES, "deepspeed.runtime.zero.stage_9:Optimizer", "step")
    with pytest.raises(UserError, match=r"no step in deepspeed\.runtime\.zero\.stage_9:Optimizer"):
        private.check_private_names()


def test_keys_of_files_are_those_by_which_state_is_resharded(private: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.checkpoint import constants

    for name, key in private.STATE_KEYS.items():
        assert getattr(constants, name) == key
        with monkeypatch.context() as patch:
            patch.setattr(constants, name, "renamed")
            with pytest.raises(UserError, match=f"{name} = '{key}' in deepspeed.checkpoint.constants"):
                private.check_private_names()
        with monkeypatch.context() as patch:
            patch.delattr(constants, name)
            with pytest.raises(UserError, match=f"no {name} in deepspeed.checkpoint.constants"):
                private.check_private_names()


def test_no_private_name_is_touched_that_is_not_in_the_list(private: Any) -> None:
    """Of DeepSpeed's objects: whatever begins with _ and does not belong to the one who touches it."""
    listed = {name for _, name in private.list_private_names()}
    touched = set()
    for path in ENGINE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                own = isinstance(node.value, ast.Name) and node.value.id in ("self", "torch")
                if not own:
                    touched.add(node.attr)
    assert "_grad_acc_hooks" in touched
    assert touched <= listed


def lose_a_name() -> None:
    """As if DeepSpeed had none of this name, and nothing that asks for it had been imported yet."""
    module: Any = importlib.import_module("deepspeed.comm.torch")
    del module.build_shm_op
    for name in [name for name in sys.modules if name.startswith(("smoltrain.engine.", "smoltrain.training."))]:
        del sys.modules[name]


def test_the_command_says_it_without_a_traceback(tmp_path: Path) -> None:
    life = zygote().train([f"run.folder={tmp_path}"], 1, tmp_path / "log", lose_a_name)
    assert life.end() == [BAD_INPUT], life.text()
    (line,) = [line for line in life.text().splitlines() if line.startswith("error:")]
    assert line.startswith("error: DeepSpeed 0.19.8 is not the one that smoltrain knows: saw no build_shm_op in")
    assert "Traceback" not in life.text()


def test_a_process_may_train_on_another_device_than_before(private: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed chooses once for a process; a stand-in for the accelerator of a GPU gives way to the CPU's."""
    chooser = importlib.import_module("deepspeed.accelerator.real_accelerator")
    monkeypatch.setattr(chooser, "ds_accelerator", SimpleNamespace(device_name=lambda: "cuda"))
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    private.choose_accelerator("cpu")
    chosen = chooser.get_accelerator()
    assert chosen.device_name() == "cpu"
    private.choose_accelerator("cpu")
    assert chooser.get_accelerator() is chosen, "the same device again: nothing is chosen anew"
