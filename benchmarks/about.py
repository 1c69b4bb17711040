"""What a measurement depends on: machine, versions, settings, the command itself."""

import datetime
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from smoltrain.distributed.cpu_cores import num_cores
from smoltrain.redact import redact_tree

ALWAYS = ("smoltrain", "torch", "numpy")


def describe_benchmark(settings: dict[str, Any], packages: Sequence[str]) -> dict[str, Any]:
    """The head of every bench's JSON; `packages` are those whose versions matter beside ALWAYS."""
    head: dict[str, Any] = {
        "command": shlex.join(["smoltrain", *sys.argv[1:]]),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": {
            "processor": _processor_name(),
            "cores": num_cores(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in (*ALWAYS, *packages)},
        "settings": settings,
    }
    return redact_tree(head)


def _processor_name() -> str:
    """Its name; Linux tells it in one place only."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
