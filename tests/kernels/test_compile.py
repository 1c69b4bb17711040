"""Where torch.compile runs, and what a block, a loss and an update are when it does."""

from pathlib import Path
from typing import Any

import pytest
import torch

from smoltrain.errors import UserError
from smoltrain.kernels import compile
from smoltrain.kernels.compile import CompilableFunction

CPU = torch.device("cpu")


@pytest.fixture
def equipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nothing is missing."""
    monkeypatch.setattr(compile, "missing_for_compile", lambda _: None)


@pytest.mark.usefixtures("equipped")
@pytest.mark.parametrize(("asked", "flop", "on", "reason"), [
    ("auto", 1e13, False, "auto: 1.0e+13 FLOP to do, it pays from about 1e+14"),
    ("auto", 2e14, True, "auto: 2.0e+14 FLOP to do, it pays from about 1e+14"),
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
