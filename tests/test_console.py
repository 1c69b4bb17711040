"""A console that cannot be written to costs nothing but itself."""

import os
import select
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from smoltrain.console import TERMINAL_VARIABLE

CODE = """
import os, sys
from smoltrain.console import guard_console, take_console_warnings
guard_console()
for i in range(3):
    print("line", i, "of K\\xf6nig Lear")
    os.system("echo from a child")
with open(sys.argv[1], "w") as file:
    print(file.fileno(), *take_console_warnings(), sep="\\n", file=file)
sys.exit(7)
"""


def run(redirect: str, out: Path, **environment: str) -> str:
    """What is left in `out` by a process whose console the shell has spoilt; its exit code must be its own.

    BROKEN in `redirect` is the number of a pipe whose reader is gone.
    """
    reader, broken = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" "$2" {redirect.replace("BROKEN", str(broken))}', sys.executable, CODE, out],
        env=os.environ | environment, capture_output=True, check=False, text=True, encoding="utf-8", timeout=60,
        pass_fds=(broken,),
    )  # fmt: skip
    os.close(broken)
    assert ended.returncode == 7, ended.stderr
    assert ended.stderr == ""
    return out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("redirect", "said"),
    [
        (">/dev/full", "stdout cannot be written to (No space left on device)"),
        (">&BROKEN 2>&BROKEN", "stdout cannot be written to (Broken pipe)"),
        (">&-", "stdout cannot be written to (closed before the start)"),
        ("<&- >&- 2>&-", "stdout and stderr cannot be written to (closed before the start)"),
        ("<&-", ""),
    ],
)
def test_a_console_that_is_lost_is_told_of_once_and_changes_no_exit_code(
    tmp_path: Path, redirect: str, said: str
) -> None:
    number, *lost = run(redirect, tmp_path / "out").splitlines()
    assert int(number) > 2, "no file takes the place of a stream that was closed"
    assert lost == ([f"the console is dropped: {said}; all else goes on"] if said else [])


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_letters_that_a_console_has_not_are_spelled(tmp_path: Path, environment: dict[str, str]) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "out")], env=os.environ | environment, capture_output=True,
        check=False, timeout=60,
    )  # fmt: skip
    assert ended.returncode == 7, ended.stderr
    assert ended.stdout.splitlines()[0] in (b"line 0 of K\\xf6nig Lear", "line 0 of König Lear".encode())


def test_children_of_one_that_lost_its_console_know_of_it(tmp_path: Path) -> None:
    line = "the console is dropped: stdout cannot be written to (x); all else goes on"
    assert line in run("", tmp_path / "out", SMOLTRAIN_CONSOLE_LOST=line)


def test_words_that_python_took_for_ascii_are_read_again(tmp_path: Path) -> None:
    code = "import sys; from smoltrain.console import guard_console; guard_console(); print(ascii(sys.argv[1]))"
    ascii_only = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ended = subprocess.run(
        [sys.executable, "-c", code, "König"], env=os.environ | ascii_only, capture_output=True, check=True, timeout=60
    )
    assert ended.stdout == b"'K\\xf6nig'\n"


def test_the_first_character_waits_for_who_lends_the_terminal() -> None:
    own, childs = socket.socketpair()
    code = "from smoltrain.console import guard_console; guard_console(); print('one'); print('two')"
    with subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {TERMINAL_VARIABLE: str(childs.fileno())},
        pass_fds=(childs.fileno(),), stdout=subprocess.PIPE,
    ) as child:  # fmt: skip
        childs.close()
        own.settimeout(20)
        assert own.recv(1) == b"?"
        assert child.stdout is not None
        assert not select.select([child.stdout], [], [], 0.1)[0]
        own.close()
        assert child.stdout.read() == b"one\ntwo\n"


IN_A_FILE = """
import os, sys
from pathlib import Path
from smoltrain.console import guard_console, write_console_to
guard_console()
print("before")
with write_console_to(Path(sys.argv[1])) as screen:
    print("a line")
    print("a mistake", file=sys.stderr)
    os.system("echo of a child; echo its mistake >&2")
    os.write(1, b"of native code\\n")
    print("on the screen", file=screen)
print("after")
print("mistake after", file=sys.stderr)
"""


def test_what_is_printed_can_go_to_a_file_for_a_while(tmp_path: Path):
    log = tmp_path / "log"
    log.write_text("older\n")
    ended = subprocess.run(
        [sys.executable, "-c", IN_A_FILE, str(log)], capture_output=True, text=True, check=True, timeout=60
    )
    assert ended.stdout == "before\non the screen\nafter\n"
    assert ended.stderr == "mistake after\n"
    expected = ["older", "a line", "a mistake", "of a child", "its mistake", "of native code"]
    assert log.read_text().splitlines() == expected


def test_the_console_comes_back_after_an_error(tmp_path: Path):
    code = IN_A_FILE.replace("os.write(1,", "raise SystemExit(9) if screen else os.write(1,")
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "log")], capture_output=True, text=True, check=False, timeout=60
    )
    assert (ended.returncode, ended.stdout) == (9, "before\n")
