"""Programs of Python that start in a moment: a server that has imported torch forks, and the child is the program.

    subprocess.run([programs() / "smoltrain", "show", "quickstart"])

    with serve(folder, environment) as programs:  # a server of one's own, with another environment
        subprocess.run(["bash", "-c", "smoltrain show quickstart"], env={"PATH": f"{programs}:/usr/bin:/bin"})

`programs` holds `python`, `smoltrain`, `torchrun` and `deepspeed`: clients that hand their words, environment, folder
and open files to the server, wait, and end as the child ends. Each is a process of its own, only the seconds of imports
are shared. Whatever else Python is asked for (pip, another script, -I) runs as it always does. A signal to such a
program kills it, whatever the signal: what is to be stopped gently is started for real.
"""

import array
import atexit
import ctypes
import fcntl
import functools
import gc
import io
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
START_TIMEOUT_S = 120.0
PR_SET_PDEATHSIG = 1  # of sys/prctl.h
HIGH = 400  # files of a child wait here until the server's are closed
CONSOLE_SCRIPTS = {
    "smoltrain": "smoltrain.cli:main",
    "torchrun": "torch.distributed.run:main",
    "deepspeed": "deepspeed.launcher.runner:main",
}
PRELOADED = ("smoltrain", "benchmarks", "tests", "torch", "deepspeed")  # `python -m` of these is forked
CLIENT = r"""#!{python} -SE
import array, json, os, socket, sys
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
flags = [word for word in words[:4] if word in ("-u", "-P")]
rest = words[len(flags):]
module = rest[1].split(".")[0] if rest[:1] == ["-m"] else None
if name == "python" and module not in {preloaded} and not "".join(rest[:1]).endswith("launch/train.py"):
    os.execv({python!r}, [{python!r}, *words])
files = [int(fd) for fd in os.listdir("/proc/self/fd")]
files = [fd for fd in files if os.path.exists(f"/proc/self/fd/{{fd}}")]
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = dict(name=name, words=rest, files=files, environment=dict(os.environ), folder=os.getcwd())
request["programs"] = os.path.dirname(os.path.realpath(sys.argv[0]))
data = json.dumps(request).encode()
server.sendmsg([len(data).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))])
server.sendall(data)
for fd in files:
    os.close(fd)
code = int(server.recv(16) or b"1")
os._exit(code) if code >= 0 else os.kill(os.getpid(), -code)
"""


@functools.cache
def programs() -> Path:
    """Those of this test session."""
    kept = ExitStack()
    atexit.register(kept.close)
    folder = Path(kept.enter_context(tempfile.TemporaryDirectory(prefix="programs-")))
    # A fork keeps one thread, so that pyarrow may not begin another.
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
    return kept.enter_context(serve(folder, environment | {"PYTHONPATH": str(ROOT)}))


@contextmanager
def serve(folder: Path, environment: dict[str, str]) -> Iterator[Path]:
    """A folder of programs for PATH, as long as the server of these imports lives; it is started in `folder`."""
    programs = folder / ".preloaded" / "bin"
    programs.mkdir(parents=True)
    address = str(programs / "socket")
    for name in ("python", *CONSOLE_SCRIPTS):
        client = programs / name
        client.write_text(CLIENT.format(python=sys.executable, preloaded=PRELOADED, address=address), encoding="utf-8")
        client.chmod(0o755)
    server = subprocess.Popen([sys.executable, __file__, address], cwd=folder, env=environment)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not Path(address).exists():
            assert server.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.05)
        yield programs
    finally:
        server.kill()
        server.wait()


def main(address: str) -> None:
    """Import, listen, and fork for each client; tell each how its program ended."""
    import torch._inductor.compile_fx  # noqa: F401 - the first optimizer step would import it

    from smoltrain.inference import load  # noqa: F401
    from smoltrain.training import run  # noqa: F401

    with suppress(ImportError):  # the tests' own, of the functions that they send to ranks; not from another folder
        from tests import engines, sessions  # noqa: F401
    gc.collect()
    gc.freeze()  # what is shared is not looked through by each child

    assert len([*Path("/proc/self/task").iterdir()]) == 1, "a fork would lose the other threads"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address + ".new")
    listener.listen()
    Path(address + ".new").rename(address)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    running: dict[int, socket.socket] = {}
    while True:
        for key, _ in selector.select(timeout=0.01):
            if key.fileobj is listener:
                client = listener.accept()[0]
                request, files = _receive(client)
                if not (pid := os.fork()):
                    _become(request, files)
                running[pid] = client
                selector.register(client, selectors.EVENT_READ, pid)
                for fd in files:
                    os.close(fd)
            else:  # the client has gone: whoever started it has killed it
                with suppress(ProcessLookupError):
                    os.kill(key.data, signal.SIGKILL)
                selector.unregister(key.fileobj)
        for pid in [*running]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                client = running.pop(pid)
                with suppress(KeyError):
                    selector.unregister(client)
                with suppress(OSError):
                    client.sendall(str(os.waitstatus_to_exitcode(status)).encode())
                client.close()


def _receive(client: socket.socket) -> tuple[dict[str, Any], list[int]]:
    size, ancillary, _, _ = client.recvmsg(8, socket.CMSG_SPACE(4 * 250))
    files = array.array("i")
    files.frombytes(ancillary[0][2])
    with client.makefile("rb") as stream:
        return json.loads(stream.read(int.from_bytes(size, "big"))), list(files)


def _become(request: dict[str, Any], files: list[int]) -> None:
    """Be the program that the client stands for. Never returns."""
    code = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setsid()
        waiting = [fcntl.fcntl(fd, fcntl.F_DUPFD, HIGH) for fd in files]
        os.closerange(0, HIGH)
        for fd, number in zip(waiting, request["files"], strict=True):
            os.dup2(fd, number)
            os.close(fd)
        sys.stdin = open(0, encoding="utf-8")  # noqa: SIM115
        sys.stdout = io.TextIOWrapper(open(1, "wb"), encoding="utf-8", write_through=True)  # noqa: SIM115
        sys.stderr = io.TextIOWrapper(open(2, "wb"), encoding="utf-8", write_through=True)  # noqa: SIM115
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        if "SMOLTRAIN_SUPERVISOR" in os.environ:  # the process above this rank, which it looks for, is the server
            os.environ["SMOLTRAIN_SUPERVISOR"] = str(os.getppid())
        sys.executable = str(Path(request["programs"]) / "python")
        code = _run(request["name"], request["words"])
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(name: str, words: list[str]) -> int:
    if name in CONSOLE_SCRIPTS:
        module, _, function = CONSOLE_SCRIPTS[name].partition(":")
        sys.argv = [name, *words]
        return getattr(__import__(module, fromlist=["_"]), function)() or 0
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path[0] = str(Path.cwd())
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path[0] = str(Path(words[0]).parent.resolve())
        runpy.run_path(words[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    main(sys.argv[1])
