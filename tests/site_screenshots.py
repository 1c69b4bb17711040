"""The pictures of docs/results/docs-site.md, of a site that `mkdocs build` has written into site/."""

import functools
import http.server
import tempfile
import threading
from pathlib import Path

from tests.browser import chromium

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
DESKTOP, PHONE = (1280, 800), (390, 800)
PICTURES = {  # by the end of its name -> page, window
    "start": ("index.html", DESKTOP),
    "keys": ("config.html#model", DESKTOP),
    "api": ("api.html", DESKTOP),
    "phone": ("first-run.html#what-you-see", PHONE),
}


def take_pictures(site: Path) -> None:
    """Open each page in Chromium, from a server on the loopback, and write docs/images/site-NAME.png."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, (page, window) in PICTURES.items():
        with tempfile.TemporaryDirectory() as profile, chromium(Path(profile), *window) as browser:
            browser.get(f"http://127.0.0.1:{server.server_port}/{page}")
            browser.execute_async_script("setTimeout(arguments[0], 1000)")  # until the page has scrolled to its place
            browser.save_screenshot(str(IMAGES / f"site-{name}.png"))
    server.shutdown()
    server.server_close()


if __name__ == "__main__":
    take_pictures(ROOT / "site")
