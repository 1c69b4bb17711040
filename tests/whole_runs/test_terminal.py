"""A run as a person sees it: on a terminal of 80 columns, interrupted by Ctrl-C, and gone on with on a wider one."""

import re
from pathlib import Path

import pytest

from smoltrain.errors import DONE, STOPPED
from tests import launches, tiny
from tests.terminals import TerminalSession

STEPS = ("phases.main.steps=150", "phases.main.warmup_steps=2", "checkpoint.every=0", "evaluate.every=50")
SAMPLES = ("sample.every=75", "generation.max_tokens=120", "track.print_every=20")
CHOICES = ("device", "precision", "attention kernel", "gradients", "tokenizer", "data", "packing", "plan", "W&B")
DRAWN = re.compile("[⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏]|━━")  # of a spinner or a bar


@pytest.mark.slow
def test_the_screen_of_a_run_that_is_interrupted_and_goes_on(tmp_path: Path) -> None:
    words = tiny.words(tmp_path, *STEPS, *SAMPLES)
    command = [str(launches.BIN / "smoltrain"), "train", "quickstart", *words]

    # ---- 80 columns, Ctrl-C in mid-run
    narrow = TerminalSession(command, tmp_path, 80, 24, OMP_NUM_THREADS="1")
    narrow.read_until(lambda raw: "validation at step 50" in raw)
    narrow.press(b"\x03")
    narrow.read_until(lambda raw: "stopping after" in raw)
    assert narrow.finish() == STOPPED
    lines = narrow.lines
    assert "stopping after this step, then saving; Ctrl-C again leaves at once" in lines
    assert any(re.match(r"stopped after step \d+ \(SIGINT\); the same command", line) for line in lines)
    assert narrow.raw.index("looking at checkpoints and data ...") < narrow.raw.index("starting 2 ranks ...")
    assert "evaluating" in narrow.raw
    assert re.search(r"main +\d+/154  loss \d", narrow.raw), "the bar counts the whole plan"
    for line in lines:
        assert not DRAWN.search(line)
    assert [line.split()[1] for line in lines if line.startswith("step ")][:2] == ["20/154", "40/154"]
    assert narrow.raw.rindex("\x1b[?25h") > narrow.raw.rindex("\x1b[?25l"), "the cursor is back"

    # ---- 120 columns, to the end: the choices are said once, though there are two phases
    wide = TerminalSession(command, tmp_path, 120, 40, OMP_NUM_THREADS="1")
    assert wide.finish() == DONE
    lines = wide.lines
    for what in CHOICES:
        assert [line[:22].strip() for line in lines].count(what) == 1, what
    (second,) = (number for number, line in enumerate(lines) if line.startswith("phase continuation: steps 151 to 154"))
    changes = "schedule cosine -> linear, lr 0.003 -> 0.0003, weight_decay 0.1 -> 0.02"
    assert lines[second + 1] == f"new in this phase      {changes}"
    assert lines[second + 2].startswith("restored step 150 on 2 ranks, ledger ")
    assert any(re.fullmatch(r"    \.\.\. \d+ more lines? in samples.jsonl", line) for line in lines)
    assert any(line.startswith("done: 154 of 154 steps") for line in lines)
    assert "sampling" in wide.raw
    for line in lines:
        assert not DRAWN.search(line)


@pytest.mark.slow
def test_a_mistake_on_a_terminal_is_plain(tmp_path: Path) -> None:
    command = [str(launches.BIN / "smoltrain"), "train", "quickstart", "modell.hidden_size=3"]
    session = TerminalSession(command, tmp_path, 200, 24)
    session.finish()
    assert [line for line in session.lines if line][-1].startswith("error: unknown key modell")
