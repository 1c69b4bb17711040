"""What makes a measurement a command, `python -m benchmarks.NAME`, and what stands in its JSON file."""

import datetime
import inspect
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from rich.console import Console

from smoltrain import files
from smoltrain.distributed.cpu_cores import num_cores
from smoltrain.redact import redact_tree

ALWAYS = ("smoltrain", "torch", "numpy")  # packages whose versions matter to every measurement

RoundsOption = Annotated[int, typer.Option("--rounds", min=1, help="Calls of each kernel, in turn.")]
OutOption = Annotated[Path, typer.Option(help="File for the numbers, what they depend on, and the command.")]
OUT = Path("bench.json")


def make_app(benchmark: Callable[..., None], example: str) -> typer.Typer:
    """The command of one measurement; its help is the function's first paragraph. smoltrain.cli.run_app runs it."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    summary = (inspect.getdoc(benchmark) or "").partition("\n\n")[0]
    app.command(help=summary, epilog=f"Example: python -m {benchmark.__module__} {example}")(benchmark)
    return app


def make_console() -> Console:
    """A console that takes words as they are."""
    return Console(markup=False, highlight=False)


def write_result(out: Path, settings: dict[str, Any], packages: Sequence[str], numbers: dict[str, Any]) -> None:
    """Write what was measured, headed by what it depends on, and say where."""
    files.write_json_file(out, describe_benchmark(settings, packages) | numbers)
    make_console().print(out)


def describe_benchmark(settings: dict[str, Any], packages: Sequence[str]) -> dict[str, Any]:
    """The head of every JSON file; `packages` are those whose versions matter beside ALWAYS."""
    module = f"benchmarks.{Path(sys.argv[0]).stem}"
    head: dict[str, Any] = {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": describe_hardware(),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in (*ALWAYS, *packages)},
        "settings": settings,
    }
    return redact_tree(head)


def describe_hardware() -> dict[str, Any]:
    """This machine: processor, cores, memory_gib, gpus."""
    return {
        "processor": _processor_name(),
        "cores": num_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _processor_name() -> str:
    """The processor's name, which Linux tells in one place only."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
