"""What mkdocs.yml cannot say: links that leave docs/ lead to pages of their own, and the tab Results has all results.

A page of docs/ may link to CHANGELOG.md or to a file of the code, as GitHub shows it. The site has each such file as a
page below outside/: Markdown as it is, anything else as a listing.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)")
LANGUAGES = {".py": "python", ".sh": "sh", ".yaml": "yaml", ".json": "json"}


def on_config(config: Any) -> Any:
    """Fill the tab Results with the pages of docs/results, by their titles."""
    (results,) = [entry["Results"] for entry in config.nav if "Results" in entry]
    for path in sorted((ROOT / "docs" / "results").glob("*.md")):
        title = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        results.append({title: f"results/{path.name}"})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each file outside of docs/ that a page links to, and for those that such pages link to."""
    left = [ROOT / "docs" / file.src_uri for file in files.documentation_pages()]
    seen = set(left)
    while left:
        for target in list_links_outside(left.pop()):
            if target not in seen:
                seen.add(target)
                uri, text = find_uri(target), _write_page(target)
                files.append(File.generated(config, uri, content=text, inclusion=InclusionLevel.NOT_IN_NAV))
                if target.suffix == ".md":
                    left.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:  # noqa: ARG001 - mkdocs names them
    """Turn links between docs/ and the rest of the repository into links between pages of the site."""
    uri = page.file.src_uri
    origin = ROOT / uri.removeprefix("outside/") if uri.startswith("outside/") else ROOT / "docs" / uri

    def turn(found: re.Match[str]) -> str:
        target = _resolve(origin, found[1])
        if target is None or not (uri.startswith("outside/") or _is_outside(target)):
            return found[0]
        return f"]({os.path.relpath(find_uri(target), Path(uri).parent)}{found[2] or ''})"

    return LINK.sub(turn, markdown)


def list_links_outside(page: Path) -> Iterator[Path]:
    """The files outside of docs/ that a Markdown file links to."""
    for link, _ in LINK.findall(page.read_text(encoding="utf-8")):
        target = _resolve(page, link)
        if target is not None and _is_outside(target):
            yield target


def find_uri(target: Path) -> str:
    """Where the site has a file of the repository, as a path below docs/."""
    path = target.relative_to(ROOT)
    if not _is_outside(target):
        return path.relative_to("docs").as_posix()
    return f"outside/{path.as_posix()}" + ("" if path.suffix == ".md" else ".md")


def _resolve(page: Path, link: str) -> Path | None:
    """The file of the repository that a link of this page means; None if there is none."""
    target = Path(os.path.normpath(page.parent / link))
    return target if "://" not in link and target.is_relative_to(ROOT) and target.is_file() else None


def _is_outside(target: Path) -> bool:
    return not target.is_relative_to(ROOT / "docs")


def _write_page(target: Path) -> str:
    text = target.read_text(encoding="utf-8")
    if target.suffix == ".md":
        return text
    return f"# {target.relative_to(ROOT)}\n\n````{LANGUAGES.get(target.suffix, 'text')}\n{text}````\n"
