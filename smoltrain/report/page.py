"""What the page shows, as the template (page.html) takes it: sections of notes, charts, tables and texts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import jinja2

from smoltrain.report.charts import HeatMap, LineChart
from smoltrain.run.step_axis import Stretch


@dataclass(frozen=True)
class Fact:
    """A headline number."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of plain texts."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    num_text_columns: int = 1  # the others are numbers, and stand to the right


@dataclass(frozen=True)
class Share:
    """A part of a whole."""

    label: str
    share: float
    value: str


@dataclass(frozen=True)
class SampleRow:
    """What the model wrote after one prompt, over the steps."""

    prompt: str
    texts: Sequence[tuple[int, str]]  # (step, continuation)


@dataclass(frozen=True)
class PageSection:
    """A part of the page under a heading of its own. What is empty is not drawn."""

    title: str
    notes: Sequence[str] = ()
    phases: Sequence[Stretch] = ()  # what the shades in its charts are
    charts: Sequence[LineChart | HeatMap | None] = ()
    shares: Sequence[Share] = ()
    tables: Sequence[Table] = ()
    samples: Sequence[SampleRow] = ()
    folded: Sequence[tuple[str, str]] = ()  # (title, text) that opens on a click

    @property
    def anchor(self) -> str:
        """Its name in the page's own links."""
        return self.title.lower().replace(" ", "-")

    @property
    def ends_alone(self) -> bool:
        """Whether its last small chart has no other one beside it."""
        return sum(chart is not None and not chart.is_wide for chart in self.charts) % 2 == 1

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing in it to show."""
        is_drawn = any(chart is not None for chart in self.charts)
        return not (is_drawn or self.notes or self.shares or self.tables or self.samples or self.folded)


@dataclass(frozen=True)
class Page:
    """The whole of it."""

    title: str
    subtitle: str
    state: str
    progress: float  # share of the plan
    facts: Sequence[Fact]
    sections: Sequence[PageSection]
    damage: Sequence[str] = field(default_factory=list)  # what could not be read
    footer: str = ""


def render_report_page(page: Page) -> str:
    """The page as HTML. Every text is escaped; what no UTF-8 can be (half a surrogate pair) becomes a question mark."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = _format_percent
    template = resources.files("smoltrain.report").joinpath("page.html").read_text(encoding="utf-8")
    context: dict[str, Any] = {"page": page}
    html = environment.from_string(template).render(context)
    return html.encode("utf-8", "replace").decode()


def _format_percent(share: float) -> str:
    """For a style sheet: 12.34%."""
    return f"{100 * share:.2f}%"
