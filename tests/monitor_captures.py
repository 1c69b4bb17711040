"""The captures of docs/results/watching.md: real runs, real terminals, a real browser.

`.venv/bin/python -m tests.monitor_captures` trains two small runs, watches the first one in terminals of 80 x 24 and
140 x 40, kills the second one, and writes docs/results/watching-*.txt and docs/images/compare-*.png.
"""

import re
import subprocess
import tempfile
from pathlib import Path

from smoltrain.run.run_lock import is_run_locked, lock_file
from tests import launches
from tests.browser import chromium
from tests.terminals import TerminalSession

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
IMAGES = ROOT / "docs" / "images"
COMMAND = str(launches.BIN / "smoltrain")
TERMINALS = ((80, 24), (140, 40))
WINDOWS = {"desktop": (1280, 1300), "phone": (390, 1000)}
WATCHED_STEP = 500  # at which the views are kept
KILLED_STEP = 400
SMALL = (
    "model.hidden_size=64", "model.num_hidden_layers=2", "model.num_attention_heads=2", "model.num_key_value_heads=1",
    "model.intermediate_size=160", "batch.sequence_length=64", "batch.micro_batch=2", "batch.accumulation=1",
    "phases.main.steps=1000", "phases.main.warmup_steps=50", "phases.continuation.steps=200", "evaluate.every=100",
    "evaluate.rows=16", "sample.every=100", "checkpoint.every=100", "generation.max_tokens=60", "track.wandb=off",
    "engine.precision=fp32",
)  # fmt: skip


def start_run(folder: Path, name: str, *overrides: str) -> tuple[subprocess.Popen[bytes], list[str]]:
    """A small run in the background."""
    words = [*SMALL, *overrides, f"run.name={name}", f"run.folder={folder / 'runs'}"]
    return launches.start("smoltrain", words, folder / f"{name}.log"), words


def capture(folder: Path) -> None:
    """Train, watch, kill, list and compare in a folder; write the captures."""
    process, _ = start_run(folder, "one")
    sessions = [TerminalSession([COMMAND, "watch", "one"], folder, *size) for size in TERMINALS]
    for session, (columns, lines) in zip(sessions, TERMINALS, strict=True):
        session.read_until(
            lambda raw: max(map(int, re.findall(r"  (\d+)/1200", raw.replace(",", ""))), default=0) > WATCHED_STEP
        )
        number = len(session.pictures)  # of the one that is being drawn
        session.read_until(lambda raw, number=number: raw.count("\x1b[H") > number)
        picture = session.pictures[number - 1]
        (RESULTS / f"watching-{columns}x{lines}.txt").write_text("\n".join(picture).rstrip() + "\n", encoding="utf-8")
    for session in sessions:
        session.finish()
    assert process.wait(launches.TIMEOUT_S) == 0
    process, words = start_run(folder, "two", "phases.main.lr=2e-3", "phases.main.weight_decay=0.0")
    launches.wait_for_step(folder / "runs" / "two", KILLED_STEP, process)
    launches.kill_all(words)
    process.wait(launches.TIMEOUT_S)
    assert is_run_locked(lock_file(folder / "runs", "two")) is False
    listed = TerminalSession([COMMAND, "runs"], folder, *TERMINALS[0])
    listed.finish()
    (RESULTS / "watching-runs.txt").write_text("\n".join(listed.lines).rstrip() + "\n", encoding="utf-8")
    words = [COMMAND, "compare", "one", "two", "--html", "compare.html"]
    compared = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True).stdout
    (RESULTS / "watching-compare.txt").write_text(compared.replace("compare.html\n", ""), encoding="utf-8")
    take_pictures(folder / "compare.html")


def take_pictures(page: Path) -> None:
    """The page of a comparison, as a browser shows it."""
    for name, window in WINDOWS.items():
        with tempfile.TemporaryDirectory() as profile, chromium(Path(profile), *window) as browser:
            browser.get(page.as_uri())
            browser.save_screenshot(str(IMAGES / f"compare-{name}.png"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        capture(Path(temporary))
