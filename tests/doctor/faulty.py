"""A process with a real fault of its own, in which a check is to find it: forked, so that the fault ends with it."""

import ctypes
import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from smoltrain.doctor.check import Finding
from tests.hosts import why_no_hosts
from tests.zygote import zygote

CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000  # of sched.h

needs_namespaces = pytest.mark.skipif(why_no_hosts() is not None, reason=str(why_no_hosts()))


def find_in_child(folder: Path, function: Callable[..., Finding], *args: Any) -> Finding:
    """What function(*args) finds in a process of its own."""
    log = folder / "child.log"
    log.unlink(missing_ok=True)
    life = zygote().fork(1, log, _print_finding, function, args)
    assert life.end() == [0], life.text()
    return Finding(**json.loads(life.text().splitlines()[-1]))


def _print_finding(function: Callable[..., Finding], args: tuple[Any, ...]) -> None:
    print(json.dumps(asdict(function(*args))), flush=True)


def mount_tmpfs(folder: Path, options: str) -> None:
    """In this process alone: a file system of its own at `folder`."""
    leave_namespace(CLONE_NEWNS)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "smoltrain-test", str(folder)], check=True)


def leave_namespace(kind: int) -> None:
    """man 2 unshare."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(kind):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
