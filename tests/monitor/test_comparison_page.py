"""A comparison as a page: whole in itself, and nothing in it is taken for HTML."""

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from smoltrain.monitor import comparison_page
from smoltrain.monitor.compare import TableRow, compare_named_runs
from smoltrain.monitor.comparison_page import render_page
from tests.browser import asked_for, chromium
from tests.monitor.records import make_run

EVIL = "<script>alert(1)</script>"


class Tags(HTMLParser):
    """Collects the tags and texts of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_a_page_has_all_of_a_comparison_and_escapes_it(tmp_path: Path) -> None:
    first = make_run(tmp_path, "run.name=one")
    second = make_run(tmp_path, "run.name=two", "phases.main.lr=1e-3")
    comparison = compare_named_runs([str(first), str(second)])
    one, two = comparison.runs
    evil = replace(
        comparison, runs=[one, replace(two, label=f"two {EVIL}")], verdicts=[EVIL],
        differences=[*comparison.differences, TableRow("sample.prompts", [f'"{EVIL}"', "b"])],
    )  # fmt: skip
    page = render_page(evil)
    tags = Tags()
    tags.feed(page)
    assert "script" not in tags.tags
    assert [text for text in tags.texts if text.startswith("<script>")] == [EVIL], "as the verdict says it"
    for text in ("phases.main.lr", "0.003", "0.001", "5.5000 at 8", f'"{EVIL}"', f"two {EVIL}"):
        assert text in tags.texts, text
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    (picture,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(picture).startswith(b"\x89PNG")
    assert "default-src 'none'" in page


def test_runs_of_one_config_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison_page, "render_png", lambda _: b"")  # half a second
    runs = [make_run(tmp_path, "run.name=one"), make_run(tmp_path, "run.name=two")]
    assert "Their configs are the same" in render_page(compare_named_runs([str(run) for run in runs]))


@pytest.mark.browser
@pytest.mark.slow
def test_a_phone_shows_it_in_its_width_and_it_asks_nobody(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "run.name=one"), make_run(tmp_path, "run.name=two", "phases.main.lr=1e-3")]
    page = tmp_path / "compare.html"
    page.write_text(render_page(compare_named_runs([str(run) for run in runs])), encoding="utf-8")
    with chromium(tmp_path / "profile", 390, 800) as browser:
        browser.get(page.as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
        assert browser.execute_script("return document.images[0].naturalWidth") == 1170
        assert asked_for(browser) == {page.as_uri()}
