"""Where torch.compile runs, and what a block, a loss and an update are when it does."""

import functools
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from smoltrain.errors import UserError
from smoltrain.kernels import compile
from smoltrain.kernels.compile import (
    CompilableFunction,
    compiled_code_folder,
    compiler_options,
    is_known_to_compiler,
    keep_compiled_code,
    note_compiled,
)

CPU = torch.device("cpu")


@pytest.fixture
def equipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nothing is missing."""
    monkeypatch.setattr(compile, "missing_for_compile", lambda _: None)


@pytest.mark.usefixtures("equipped")
@pytest.mark.parametrize(("asked", "flop", "on", "reason"), [
    ("auto", 1e13, False, "auto: would save about 0.1 of 0.6 minutes of two CPU cores, and cost 0.5"),
    ("auto", 2e14, True, "auto: saves about 1.2 of 11.1 minutes of two CPU cores, costs 0.5"),
    ("on", 0.0, True, "as engine.compile asks"),
    ("off", 1e20, False, "as engine.compile asks"),
])  # fmt: skip
def test_it_is_for_long_runs(asked: Any, flop: float, on: bool, reason: str) -> None:
    assert compile.choose_compile(asked, CPU, flop) == (on, reason)


def test_without_a_compiler_auto_is_off_and_on_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    compile.missing_for_compile.cache_clear()
    try:
        assert compile.choose_compile("auto", CPU, 1e20) == (False, "no C++ compiler is installed (no-such-compiler)")
        with pytest.raises(UserError, match=r"torch.compile cannot run here: saw no C\+\+ compiler .*engine\.compile"):
            compile.choose_compile("on", CPU, 1e20)
    finally:
        compile.missing_for_compile.cache_clear()


def test_python_without_headers_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compile.shutil, "which", lambda name: name)
    monkeypatch.setattr(compile.sysconfig, "get_path", lambda _: str(tmp_path))
    compile.missing_for_compile.cache_clear()
    try:
        assert compile.missing_for_compile("cpu") == "Python's headers are not installed"
    finally:
        compile.missing_for_compile.cache_clear()


def test_a_function_stays_what_it_is_and_has_a_compiled_form() -> None:
    calls = []

    @CompilableFunction
    def double(x: torch.Tensor) -> torch.Tensor:
        calls.append(torch.compiler.is_compiling())
        return x * 2

    x = torch.arange(4.0)
    assert double(x).tolist() == [0, 2, 4, 6]
    assert calls == [False]
    if compile.missing_for_compile("cpu") is None:
        assert torch.equal(double.compiled(x), double(x))


@pytest.mark.skipif(torch.cuda.is_available(), reason="inductor then draws for itself; on a CPU the draws are torch's")
def test_a_compiled_dropout_draws_as_the_written_one() -> None:
    @CompilableFunction
    def thinned(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(x * 2, 0.25)

    x = torch.ones(4096)
    torch.manual_seed(3)
    drawn = thinned(x)
    assert 0.2 < (drawn == 0).float().mean() < 0.3
    if compile.missing_for_compile("cpu") is None:
        torch.manual_seed(3)
        assert torch.equal(thinned.compiled(x), drawn)


def test_what_is_compiled_is_kept_for_the_user_or_where_torch_was_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.delenv("SMOLTRAIN_CACHE", raising=False)
    assert compiled_code_folder() == Path.home() / ".cache" / "smoltrain" / "compiled"
    monkeypatch.setenv("SMOLTRAIN_CACHE", str(tmp_path / "ours"))
    assert compiled_code_folder() == tmp_path / "ours" / "compiled"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "torchs"))
    assert compiled_code_folder() == tmp_path / "torchs"


@pytest.mark.skipif(compile.missing_for_compile("cpu") is not None, reason="nothing is compiled without a compiler")
def test_inductor_keeps_code_and_headers_in_that_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch._inductor import codecache
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    for name in ("_HEADER_DIR", "_HEADER_LOCK_DIR"):  # torch's own, which a new version might rename
        monkeypatch.setattr(codecache, name, getattr(codecache, name))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.setenv("SMOLTRAIN_CACHE", str(tmp_path))
    keep_compiled_code()
    assert Path(cache_dir()) == tmp_path / "compiled"
    assert Path(codecache._HEADER_DIR).parent == tmp_path / "compiled"
    assert Path(codecache._HEADER_LOCK_DIR).is_relative_to(tmp_path / "compiled")


def test_what_was_compiled_once_is_known_by_all_that_it_depends_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert not is_known_to_compiler("a decoder")
    note_compiled("a decoder")
    assert is_known_to_compiler("a decoder")
    assert not is_known_to_compiler("another decoder")
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert not is_known_to_compiler("a decoder")


def test_a_folder_that_cannot_be_written_costs_no_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    note_compiled("a decoder")
    assert not is_known_to_compiler("a decoder")


@pytest.mark.skipif(compile.missing_for_compile("cpu") is not None, reason="nothing is compiled without a compiler")
def test_one_compilation_serves_every_length() -> None:
    from torch._dynamo.utils import counters

    @functools.partial(CompilableFunction, any_length=True)
    def blend(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.float() + (y - x.float()) * 0.1

    before = counters["stats"]["unique_graphs"]
    for length in (70_001, 9_000, 1_000_003):
        x = torch.linspace(-1, 1, length)
        y = x.flip(0)
        assert torch.equal(blend.compiled(x, y), blend(x, y))
    assert counters["stats"]["unique_graphs"] - before == 1


@pytest.mark.slow
@pytest.mark.skipif(compile.missing_for_compile("cpu") is not None, reason="nothing is compiled without a compiler")
def test_the_headers_built_ahead_are_those_that_kernels_take(tmp_path: Path) -> None:
    """In a process of its own, as torch remembers what it has built. Its random state stays as it is."""
    script = """
import torch
from smoltrain.kernels.compile import CompilableFunction, build_headers_in_background, compiled_code_folder
def built():
    return sorted(path.name for path in compiled_code_folder().glob("precompiled_headers/*.?ch"))
torch.manual_seed(1)
before = torch.random.get_rng_state()
assert not built()
build_headers_in_background().result()
ahead = built()
assert build_headers_in_background() is None
assert len(ahead) == 1, ahead
assert torch.equal(torch.random.get_rng_state(), before)
x = torch.linspace(-1, 1, 4096)
assert torch.equal(CompilableFunction(lambda x: x * 2 + 1).compiled(x), x * 2 + 1)
assert built() == ahead
"""
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_torch_is_asked_for_cuda_graphs_by_options_that_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    inductor: Any = importlib.import_module("torch._inductor.config")
    asked: dict[str, Any] = {}
    monkeypatch.setattr(torch, "compile", lambda function, **how: asked.update(how["options"]) or function)
    _ = CompilableFunction(torch.neg, cuda_graphs=True).compiled
    assert asked == {
        **compiler_options(), "triton.cudagraphs": True, "triton.cudagraph_or_error": True, "graph_partition": False
    }  # fmt: skip
    with inductor.patch(asked):  # which takes no name that it does not know
        assert inductor.triton.cudagraph_or_error
    assert not any("graph" in name for name in compiler_options())
