"""docs/images/doctor.svg: `smoltrain doctor quickstart` on a terminal of 100 columns, with three mistakes to find.

`.venv/bin/python -m tests.doctor_capture` takes it anew, on a machine that is quiet.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from tests.terminals import TerminalSession

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "images" / "doctor.svg"
COMMAND = "smoltrain doctor quickstart"
MISTAKES = {"CUDA_LAUNCH_BLOCKING": "1", "OMP_NUM_THREADS": "64", "GLOO_SOCKET_IFNAME": "ib7"}
COLUMNS, LINES = 100, 60
COLOURS = {"ok": "#d0d7de", "warning": "#e3b341", "fault": "#ff7b72"}
LINE_PIXELS, CHARACTER_PIXELS, MARGIN_PIXELS = 17, 7.83, 14


def take_picture() -> None:
    """Run the command where nothing else is, and draw what stands on its terminal."""
    program = Path(sys.executable).parent / "smoltrain"
    with tempfile.TemporaryDirectory(prefix="smoltrain-") as folder:
        command = [str(program), *COMMAND.split()[1:]]
        session = TerminalSession(command, Path(folder), COLUMNS, LINES, HOME=folder, **MISTAKES)
        session.finish()
        variables = " ".join(f"{name}={value}" for name, value in MISTAKES.items())
        lines = [line.replace(folder, "/home/you") for line in session.lines]
    PICTURE.write_text(draw_terminal([f"$ {variables} \\", f"    {COMMAND}", *lines]), encoding="utf-8")


def draw_terminal(lines: Sequence[str]) -> str:
    """Lines as SVG; those of a finding, and what follows them, in the colour of its status."""
    width = round(2 * MARGIN_PIXELS + COLUMNS * CHARACTER_PIXELS)
    while lines and not lines[-1]:
        lines = lines[:-1]
    height = 2 * MARGIN_PIXELS + LINE_PIXELS * len(lines)
    texts: list[str] = []
    colour = "white"
    for number, line in enumerate(lines):
        status = line.partition(" ")[0]
        if status:
            colour = COLOURS.get(status, "white")
        y = MARGIN_PIXELS + LINE_PIXELS * (number + 0.75)
        texts.append(f'<text x="{MARGIN_PIXELS}" y="{y:g}" fill="{colour}" xml:space="preserve">{escape(line)}</text>')
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="Menlo, Consolas, DejaVu Sans Mono, monospace" font-size="13">'
    )
    background = f'<rect width="{width}" height="{height}" rx="6" fill="#0d1117"/>'
    return "\n".join([head, background, *texts, "</svg>", ""])


if __name__ == "__main__":
    take_picture()
