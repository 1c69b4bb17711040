"""Is it right on this GPU, and how fast: `python -m benchmarks.gpu_check --seconds 480 --out FOLDER`.

What launch/gpu_check.sh runs where it has installed everything. Parts come in the order of what one wants to know
first, each within a limit of its own; the page OUT/NAME.md is written anew behind each, so that a check that is cut
keeps what it has found. Exit code: 0 if all parts passed, 1 if one failed, 3 if none failed and one was cut or not run.
"""

import argparse
import datetime
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.command import describe_hardware
from benchmarks.parts import Part, Verdict, find_exit_code, run_part
from smoltrain import files

PACKAGES = ("torch", "triton", "transformers", "deepspeed", "liger-kernel", "flash-attn", "flash-attn-4", "smoltrain")
QUERY = "name,driver_version,memory.total,clocks.max.sm,power.limit"
LIMITS_S = {"tests": 120.0, "quickstart": 80.0, "resume": 80.0, "zero": 60.0, "profile": 70.0}
TINY_LIMIT_S = 600.0  # of a part: a CPU that others use too may be slow
PROOF_LINES = 40  # of a part's output that the page keeps
TABLES = ("profile", "table")  # parts that print Markdown
TABLE_RESERVE_S = 10.0  # that the table leaves for its own end
SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_BYTES = 16 << 30


def list_parts(seconds: float, out: Path, *, tiny: bool) -> list[Part]:
    """In the order of worth. A hang costs no other part its turn; the table has all that is left."""
    limits_s = dict.fromkeys(LIMITS_S, TINY_LIMIT_S) if tiny else LIMITS_S
    more = ("--tiny",) if tiny else ()
    proofs = ("tests", "quickstart", "resume", "zero")
    parts = [_make_part(name, f"gpu_proofs {name}", more, limits_s[name]) for name in proofs]
    peaks = ("--peaks", str((out / "peaks.json").resolve()))
    parts.append(_make_part("profile", "gpu_profile", (*more, *peaks), limits_s["profile"]))
    parts.append(_make_part("table", "gpu_table", (*more, *peaks), seconds))
    return parts


def _make_part(name: str, words: str, more: Sequence[str], limit_s: float) -> Part:
    return Part(name, (sys.executable, "-m", *f"benchmarks.{words}".split(), *more), limit_s)


def run_parts(parts: Sequence[Part], seconds: float, out: Path, head: str, scratch: str) -> dict[str, Verdict]:
    """Each part's verdict; the page is written behind each. Runs that nobody keeps are written into `scratch`."""
    deadline_s = time.monotonic() + seconds
    quiet = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = os.environ | quiet | {"TMPDIR": scratch}
    verdicts: dict[str, Verdict] = {}
    for part in parts:
        left_s = deadline_s - time.monotonic()
        print(f"== {part.name} ({max(0.0, left_s):.0f} s left)", flush=True)
        if part.name == "table":
            table_s = f"--seconds={max(0.0, left_s - TABLE_RESERVE_S):.0f}"
            part = Part(part.name, (*part.command, table_s), part.limit_s)  # noqa: PLW2901 - now that it is known
        verdicts[part.name] = run_part(part, left_s, out / f"{part.name}.log", environment, _say)
        print(format_verdict(part.name, verdicts[part.name]), flush=True)
        files.write_text_file(out / page_name(), format_page(head, verdicts, out))
    return verdicts


def find_scratch_parent() -> Path | None:
    """Memory, if there is much of it, so that no disk is measured; None is the default of tempfile."""
    if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free >= SHARED_MEMORY_BYTES:
        return SHARED_MEMORY
    return None


def _say(line: str) -> None:
    print(line, flush=True)


def format_verdict(name: str, verdict: Verdict) -> str:
    """In a line."""
    return f"{name}: {verdict.outcome}, {verdict.seconds:.0f} s ({verdict.reason})"


def format_page(head: str, verdicts: dict[str, Verdict], out: Path) -> str:
    """The page: what it was run on, the verdicts, and what each part has said."""
    lines = [head, "", "| part | verdict | s | |", "|---|---|---|---|"]
    for name, verdict in verdicts.items():
        reason = "" if name in TABLES else verdict.reason.replace("|", "/")
        lines.append(f"| {name} | {verdict.outcome} | {verdict.seconds:.0f} | {reason} |")
    for name in verdicts:
        log = out / f"{name}.log"
        if not log.exists():
            continue
        said = log.read_text(encoding="utf-8", errors="replace").rstrip("\n").splitlines()
        lines += ["", f"## {name}", ""]
        if name in TABLES:
            lines += said
        else:
            lines += ["```", *said[-PROOF_LINES:], "```"]
    return "\n".join(lines) + "\n"


def page_name() -> str:
    """gpu-nvidia-h200.md, by the name of the device; cpu.md on a machine that has none."""
    if not torch.cuda.is_available():
        return "cpu.md"
    return f"gpu-{torch.cuda.get_device_name().lower().replace(' ', '-')}.md"


def describe_check(command: Sequence[str]) -> str:
    """The head of the page: hardware, versions, the command, when."""
    hardware = describe_hardware()
    gpus = ", ".join(hardware["gpus"]) or "no GPU"
    versions = [f"python {sys.version.split()[0]}"]
    for name in PACKAGES:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    lines = [
        f"# {gpus}: is it right, and how fast",
        "",
        f"`launch/gpu_check.sh run {shlex.join(command)}`, {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        "",
        f"- {gpus}; {hardware['processor']}, {hardware['cores']} cores, {hardware['memory_gib']} GiB",
        f"- {', '.join(versions)}; CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}",
    ]
    try:
        words = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
        seen = subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()
        lines += [f"- {QUERY}: {line}" for line in seen]
    except (OSError, subprocess.SubprocessError):
        lines.append("- no nvidia-smi")
    return "\n".join(lines)


def check_gpu() -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=480.0, help="that all parts may take together")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"), help="folder for the page and the logs")
    parser.add_argument("--only", default="", help="parts, with commas between")
    parser.add_argument("--tiny", action="store_true", help="shapes that a CPU trains in seconds, to try the script")
    arguments = parser.parse_args()
    parts = list_parts(arguments.seconds, arguments.out, tiny=arguments.tiny)
    only = [name for name in arguments.only.split(",") if name]
    unknown = set(only) - {part.name for part in parts}
    if unknown:
        names = ", ".join(part.name for part in parts)
        parser.error(f"--only: no such part: {', '.join(sorted(unknown))}; there are {names}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "peaks.json").unlink(missing_ok=True)  # of another check, another machine perhaps
    command = [f"{arguments.seconds:.0f}", *(["--tiny"] if arguments.tiny else [])]
    if only:
        command += ["--only", arguments.only]
    head = describe_check(command)
    print(head, flush=True)
    chosen = [part for part in parts if not only or part.name in only]
    with tempfile.TemporaryDirectory(dir=find_scratch_parent(), ignore_cleanup_errors=True) as scratch:
        verdicts = run_parts(chosen, arguments.seconds, arguments.out, head, scratch)
    print("== verdicts")
    for name, verdict in verdicts.items():
        print(format_verdict(name, verdict))
    print(f"page: {arguments.out / page_name()}", flush=True)
    return find_exit_code(list(verdicts.values()))


if __name__ == "__main__":
    sys.exit(check_gpu())
