"""torch.compile: where it can run, and functions that are compiled at their first call."""

import contextlib
import functools
import hashlib
import importlib
import os
import platform
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, Literal, ParamSpec, TypeVar

import torch

from smoltrain.errors import Problem, UserError
from smoltrain.files import user_cache_folder
from smoltrain.kernels.compile_gain import CompileChoice, weigh_compiling

SMALLEST_KERNEL = """
#include <torch/csrc/inductor/cpp_prefix.h>
extern "C" void kernel(float* out) { at::vec::Vectorized<float>(1).store(out); }
"""
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
P = ParamSpec("P")
R = TypeVar("R")


def choose_compile(
    requested: Literal["auto", "on", "off"], device: torch.device, flop: float,
    region: Literal["block", "model"] = "block",
) -> CompileChoice:  # fmt: skip
    """Whether to compile for so many floating-point operations on this device: auto is compile_gain.py's rule.

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
    return weigh_compiling(device.type, flop, region)


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


def compiler_options(*, any_length: bool = False, cuda_graphs: bool = False) -> dict[str, Any]:
    """What inductor is told beyond its defaults."""
    # Inductor's own random numbers save a pass over memory on a GPU; on a CPU torch's take half their time.
    options: dict[str, Any] = {"fallback_random": not torch.cuda.is_available()}
    if platform.machine() == "x86_64":
        # It would compile a file of torch's headers for each set of vector instructions that the CPU has, and load each
        # in a process of its own at every start. Whatever compiles inductor's C++20 knows them all.
        options["cpp.vec_isa_ok"] = True
    if any_length:
        # Else the code would be for one thread if the first length that came was a small one.
        options["cpp.dynamic_threads"] = True
    if cuda_graphs:
        options["triton.cudagraphs"] = True
        # Else code that cannot be recorded would be launched as ever, alone or as a part of what is replayed, unsaid.
        options["triton.cudagraph_or_error"] = True
        options["graph_partition"] = False
    return options


def compiled_code_folder() -> Path:
    """Where compiled code is kept: $TORCHINDUCTOR_CACHE_DIR, else `compiled` in $SMOLTRAIN_CACHE or ~/.cache/smoltrain.

    torch's own place is the folder for temporary files, which many machines empty when they start.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else user_cache_folder() / "compiled"


def keep_compiled_code() -> None:
    """Have torch keep in `compiled_code_folder` what it will compile in this process."""
    folder = compiled_code_folder()
    os.environ[CACHE_VARIABLE] = str(folder)
    codecache: Any = importlib.import_module("torch._inductor.codecache")
    # The C++ headers, compiled once for all kernels; where torch keeps them is no variable but of this module.
    if hasattr(codecache, "_HEADER_DIR") and hasattr(codecache, "_HEADER_LOCK_DIR"):
        codecache._HEADER_DIR = str(folder / "precompiled_headers")
        codecache._HEADER_LOCK_DIR = str(folder / "precompiled_headers" / "locks")


def build_headers_in_background() -> "Future[None] | None":
    """Compile the C++ headers that all kernels on a CPU share, five seconds of work without which none begins.

    Meanwhile the caller may do anything, draw random numbers too. So no function is compiled here: when torch has done
    that, it puts the random state back over whatever another thread has drawn. None where there are headers already;
    should they be another compiler's, the first kernel builds its own. The future has the errors.
    """
    keep_compiled_code()  # and its imports, in the thread that calls
    folder = compiled_code_folder() / "precompiled_headers"
    if any(folder.glob("*.?ch")):
        return None
    executor = ThreadPoolExecutor(1, thread_name_prefix="headers")
    future = executor.submit(_build_headers)
    executor.shutdown(wait=False)
    return future


def _build_headers() -> None:
    """By building a kernel as inductor builds them, with the flags of all others."""
    codecache: Any = importlib.import_module("torch._inductor.codecache")
    inductor: Any = importlib.import_module("torch._inductor.config")
    if hasattr(codecache, "CppPythonBindingsCodeCache"):  # else the first kernel has to wait for them
        options = {name: value for name, value in compiler_options().items() if name.startswith("cpp.")}
        with inductor.patch(options):
            codecache.CppPythonBindingsCodeCache.load_pybinding(["float*"], SMALLEST_KERNEL)


def is_known_to_compiler(task: str) -> bool:
    """Whether `note_compiled` was called for this description of what is compiled, so that it need only be loaded."""
    return _mark_of(task).exists()


def note_compiled(task: str) -> None:
    """Remember that all code of a task is compiled and kept. A full disk is no reason to stop training."""
    mark = _mark_of(task)
    with contextlib.suppress(OSError):
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def _mark_of(task: str) -> Path:
    digest = hashlib.sha256(f"{torch.__version__} {task}".encode()).hexdigest()
    return compiled_code_folder() / "tasks" / digest[:16]


class CompilableFunction(Generic[P, R]):
    """A function, and as `compiled` the same function after torch.compile.

    It is compiled when it is first called, and anew for each new shape: training has few. With `any_length` one
    compilation serves tensors of every length, and every model: for loops over flat tensors. It is so on a CPU alone;
    on a GPU nobody has measured what that costs. torch keeps what it compiled on disk (compiled_code_folder), so that
    the next process only loads it. With `cuda_graphs` a GPU replays it; what it returned and the gradients of its
    weights are overwritten then.
    """

    def __init__(self, function: Callable[P, R], *, any_length: bool = False, cuda_graphs: bool = False) -> None:
        self.function = function
        self._any_length = any_length
        self._cuda_graphs = cuda_graphs

    @functools.cached_property
    def compiled(self) -> Callable[P, R]:
        """The function after torch.compile. Made on first use, for the import of the compiler alone takes a second."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, about torch.jit
            keep_compiled_code()
            any_length = self._any_length and not torch.cuda.is_available()
            options = compiler_options(any_length=any_length, cuda_graphs=self._cuda_graphs)
            compiled = torch.compile(self.function, dynamic=any_length, options=options)
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
        return compiled

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The function as it was written."""
        return self.function(*args, **kwargs)
