"""A comparison as one HTML page that loads nothing from elsewhere: the picture is in it, and every text is escaped."""

import base64
from collections.abc import Sequence
from html import escape

from smoltrain.monitor.compare import RunComparison, TableRow
from smoltrain.monitor.comparison_plot import render_png

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2733; margin: 0 auto; padding: 1rem; max-width: 70rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid #e3e6e9; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
td { font-variant-numeric: tabular-nums; }
img { width: 100%; min-width: 36rem; height: auto; } /* on a phone it scrolls: its letters would be dots */
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f8fb; padding: .8rem; }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # the page could load nothing if it tried


def render_page(comparison: RunComparison) -> str:
    """The whole page."""
    labels = [run.label for run in comparison.runs]
    title = " and ".join(labels)
    picture = base64.b64encode(render_png(comparison.runs)).decode("ascii")
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>smoltrain: {escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        _render_table(labels, comparison.results),
        "<h2>Losses</h2>",
        "<p>Lines: training, dots: validation; each run in one colour.</p>",
        f'<div class="table"><img alt="Losses of {escape(title)} over steps, tokens and hours"',
        f'src="data:image/png;base64,{picture}"></div>',
        "<h2>Configs</h2>",
    ]
    if comparison.differences:
        parts.append(_render_table(labels, comparison.differences))
    else:
        parts.append("<p>Their configs are the same, but for name and folder.</p>")
    parts.append("<h2>Rows they trained on</h2>")
    for run, verdict in zip(comparison.runs[1:], comparison.verdicts, strict=True):
        parts.append(f"<p>{escape(labels[0])} and {escape(run.label)}:</p><pre>{escape(verdict)}</pre>")
    return "\n".join([*parts, "</body></html>", ""])


def _render_table(labels: Sequence[str], rows: Sequence[TableRow]) -> str:
    head = "".join(f"<th>{escape(label)}</th>" for label in ("", *labels))
    lines = [f'<div class="table"><table><tr>{head}</tr>']
    for row in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in (row.name, *row.cells))
        lines.append(f"<tr>{cells}</tr>")
    return "\n".join([*lines, "</table></div>"])
