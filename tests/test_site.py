"""The pages as a site: built without a warning, every link leads somewhere, and no page asks another host."""

import functools
import http.server
import inspect
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
import yaml

import smoltrain
from docs import mkdocs_hooks
from tests.browser import asked_for, chromium

ROOT = Path(__file__).parent.parent
DESKTOP, PHONE = (1280, 800), (390, 800)
LOADS = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src")}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Links(HTMLParser):
    """What a page links to, what it loads by itself, and the places in it that a link may name."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.places: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.places.add(value)
            elif (tag, name) in LOADS and value and ("rel", "canonical") not in attrs:
                self.loads.append(value)
            elif tag == "a" and name == "href" and value:
                self.links.append(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as `mkdocs build --strict` writes it: a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search(r"^(WARNING|ERROR)", done.stderr, re.MULTILINE), done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Links]:
    return {path: Links(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}


def test_every_page_of_docs_is_there(site: Path):
    names = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")]
    built = [site / name.with_suffix(".html") for name in names if name.name != "README.md"]
    assert [path for path in built if not path.is_file()] == []
    assert (site / "index.html").is_file()


def test_every_link_leads_to_a_page_and_to_a_place_on_it(pages: dict[Path, Links]):
    broken = []
    for page, found in pages.items():
        for link in found.links + found.loads:
            parts = urlparse(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            places = pages[target].places if target in pages else set()
            if not target.is_file() or (target in pages and parts.fragment and unquote(parts.fragment) not in places):
                broken.append(f"{page.name}: {link}")
    assert broken == []


def test_nothing_is_loaded_from_another_host(site: Path, pages: dict[Path, Links]):
    assert [load for found in pages.values() for load in found.loads if urlparse(load).netloc] == []
    styles = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    assert [found for text in styles for found in re.findall(r"""url\(["']?(?:https?:)?//[^)]*""", text)] == []


def test_a_link_to_the_code_is_a_page_with_the_code(site: Path):
    page = (site / "outside" / "smoltrain" / "schedule.py.html").read_text(encoding="utf-8")
    assert "SCHEDULES" in page
    assert "outside/smoltrain/schedule.py.html" in (site / "extending.html").read_text(encoding="utf-8")
    assert 'href="../extending.html"' in (site / "outside" / "CONTRIBUTING.html").read_text(encoding="utf-8")


def test_the_tab_of_results_has_every_result(site: Path):
    page = (site / "performance.html").read_text(encoding="utf-8")
    for path in (ROOT / "docs" / "results").glob("*.md"):
        assert f'href="results/{path.stem}.html"' in page


def test_the_page_of_the_api_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^ +heading: smoltrain\.(\w+)$", page, re.MULTILINE)) == set(smoltrain.__all__)
    (shown,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert shown.strip() in inspect.cleandoc(str(smoltrain.__doc__)).replace("\n    ", "\n"), "as the docstring has it"


def test_the_site_is_written_where_git_does_not_look():
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    (folder,) = re.findall(r"^site_dir: (\w+)$", config, re.MULTILINE)
    assert f"{folder}/\n" in (ROOT / ".gitignore").read_text(encoding="utf-8")
    assert (mkdocs_hooks.ROOT / "mkdocs.yml").is_file()


def test_the_nav_names_each_page_once():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = yaml.safe_load(text)["nav"]
    named = re.findall(r"[\w/-]+\.md", str(nav))
    assert sorted(named) == sorted({path.name for path in (ROOT / "docs").glob("*.md")})


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.mark.browser
@pytest.mark.parametrize(("width", "height"), [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_pages_fit_a_window_and_ask_no_other_host(address: str, tmp_path: Path, width: int, height: int):
    with chromium(tmp_path / "profile", width, height) as browser:
        for path in sorted((ROOT / "docs").glob("*.md")):
            name = "index" if path.stem == "README" else path.stem
            browser.get(f"{address}{name}.html")
            wide = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
            assert wide <= 0, f"{name} is wider than the window"
            assert browser.execute_script("return document.querySelectorAll('article h1').length") == 1
        assert {urlparse(url).netloc for url in asked_for(browser)} == {urlparse(address).netloc}


@pytest.mark.browser
def test_the_search_finds_a_page(address: str, tmp_path: Path):
    with chromium(tmp_path / "profile", *DESKTOP) as browser:
        browser.get(f"{address}index.html?q=quickstart")
        script = "return document.querySelectorAll('.md-search-result__item').length"
        browser.set_script_timeout(60)
        found = browser.execute_async_script(
            f"const done = arguments[0]; const look = () => {{ const n = (() => {{ {script} }})();"
            " n ? done(n) : setTimeout(look, 100) }; look()"
        )
        assert found > 1
