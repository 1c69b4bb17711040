"""A real Chromium, headless, driven through Debian's chromium-driver; what its pages ask for is written down."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from selenium.webdriver import Chrome, ChromeOptions, ChromeService

FLAGS = (
    "headless",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
)


@contextmanager
def chromium(profile: Path, width: int = 1280, height: int = 800) -> Iterator[Chrome]:
    """A browser with an empty profile and a page of that many pixels."""
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, path in programs.items() if path is None]
    assert not missing, f"no {missing}: apt-get install chromium chromium-driver"
    options = ChromeOptions()
    options.binary_location = str(programs["chromium"])
    for flag in (*FLAGS, f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    service = ChromeService(str(programs["chromedriver"]))
    browser = Chrome(options, service)
    own = psutil.Process(service.process.pid).children(recursive=True)
    try:
        # The window's frame belongs to a window's size, even where nobody sees it.
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )
        yield browser
    finally:
        try:
            browser.quit()
        finally:  # a page that hangs would keep its browser alive
            for process in own:
                with suppress(psutil.NoSuchProcess):
                    process.kill()


def asked_for(browser: Chrome) -> set[str]:
    """The addresses of all requests that pages attempted since the last call, but for the browser's own pages."""
    urls: set[str] = set()
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        match message["method"]:
            case "Network.requestWillBeSent":
                urls.add(message["params"]["request"]["url"])
            case "Network.webSocketCreated" | "Network.webTransportCreated":
                urls.add(message["params"]["url"])
    return {url for url in urls if not url.startswith(("chrome:", "data:", "blob:"))}
