"""The pictures of docs/report.md: `python -m tests.report_screenshots RUN/report.html` writes them all anew."""

import sys
import tempfile
from pathlib import Path

from tests.browser import chromium

IMAGES = Path(__file__).parent.parent / "docs" / "images"
SIZES = {"desktop": (1280, 1500), "phone": (390, 1600)}  # by the end of its name -> window, in pixels


def take_pictures(page: Path, folder: Path) -> None:
    """Open the page in Chromium, and write FOLDER/report-NAME.png of what stands in the window."""
    for name, window in SIZES.items():
        with tempfile.TemporaryDirectory() as profile, chromium(Path(profile), *window) as browser:
            browser.get(f"file://{page.resolve()}")
            browser.execute_script("document.documentElement.style.scrollbarWidth = 'none'")
            browser.save_screenshot(str(folder / f"report-{name}.png"))


if __name__ == "__main__":
    take_pictures(Path(sys.argv[1]), IMAGES)
