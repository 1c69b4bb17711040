"""torch.compile: where it can run, and functions that are compiled at their first call."""

import functools
import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Generic, Literal, NamedTuple, ParamSpec, TypeVar

import torch

from smoltrain.errors import Problem, UserError

# Work in which a tenth less time makes up for compiling: 5 minutes of two cores of a CPU, or of a large GPU.
MIN_FLOP = {"cpu": 1e14, "cuda": 1e17}
P = ParamSpec("P")
R = TypeVar("R")


class CompileChoice(NamedTuple):
    """Whether code is compiled, and in a few words why."""

    on: bool
    reason: str


def choose_compile(requested: Literal["auto", "on", "off"], device: torch.device, flop: float) -> CompileChoice:
    """Whether to compile for so many floating-point operations on this device.

    Errors: UserError where it is asked for and cannot be.
    """
    if requested == "off":
        return CompileChoice(False, "as engine.compile asks")
    missing = missing_for_compile(device.type)
    if requested == "on":
        if missing is not None:
            want = "a C++ compiler and Python's headers (on Debian: apt install g++ python3-dev), or off"
            raise UserError(Problem("torch.compile cannot run here", missing, want, "engine.compile"))
        return CompileChoice(True, "as engine.compile asks")
    if missing is not None:
        return CompileChoice(False, missing)
    least = MIN_FLOP[device.type]
    return CompileChoice(flop >= least, f"auto: {flop:.1e} FLOP to do, it pays from about {least:.0e}")


@functools.cache
def missing_for_compile(device_type: str) -> str | None:
    """What torch.compile's inductor needs for this type of device and does not find; None if nothing is missing."""
    if device_type == "mps":
        return "it was not tried on MPS"
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # as inductor looks for it
    if not shutil.which(compiler):
        return f"no C++ compiler is installed ({compiler})"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's headers are not installed"
    return None


class CompilableFunction(Generic[P, R]):
    """A function, and as `compiled` the same function after torch.compile.

    It is compiled when it is first called, and anew for each new shape: training has few. torch keeps what it compiled
    on disk, so that the next process only loads it.
    """

    def __init__(self, function: Callable[P, R]) -> None:
        self._function = function

    @functools.cached_property
    def compiled(self) -> Callable[P, R]:
        """The function after torch.compile. Made on first use, for the import of the compiler alone takes a second."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, about torch.jit
            # Inductor's own random numbers save a pass over memory on a GPU; on a CPU torch's take half their time.
            on_cpu = not torch.cuda.is_available()
            compiled = torch.compile(self._function, dynamic=False, options={"fallback_random": on_cpu})
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
        return compiled

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The function as it was written."""
        return self._function(*args, **kwargs)
