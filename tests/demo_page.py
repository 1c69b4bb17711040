"""The demo's page as a person uses it in a browser, and the pictures of it.

`.venv/bin/python -m tests.demo_page RUN` writes docs/images/demo-desktop.png and demo-phone.png anew; the pictures in
the pages are of `quickstart`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from smoltrain.distributed.world import free_port
from tests.launches import BIN, environment, wait_until

if TYPE_CHECKING:
    from selenium.webdriver import Chrome
    from selenium.webdriver.remote.webelement import WebElement

IMAGES = Path(__file__).parent.parent / "docs" / "images"
WINDOWS = {"desktop": (1280, 900), "phone": (390, 1500)}
CONTROL_A, TAB = "\ue009a", "\ue004"  # as WebDriver names keys
PROMPT = "**ROMEO**  \n"
SEED = 5


class PersonAtThePage:
    """Reads and uses the page in a browser."""

    def __init__(self, chromium: Chrome) -> None:
        self._chromium = chromium

    def find(self, css: str) -> WebElement:
        wait_until(lambda: bool(self._chromium.find_elements("css selector", css)))
        return self._chromium.find_element("css selector", css)

    def read(self, css: str) -> list[str]:
        found = self._chromium.find_elements("css selector", css)
        return [str(element.get_property("textContent")) for element in found]

    def answers(self) -> list[str]:
        return self.read("#passages .answer")

    def click(self, name: str) -> None:
        self.find(f"#{name}").click()

    def generate_until(self, condition: Callable[[], bool]) -> None:
        """Click once more where the page was still busy with a stop."""

        def is_done() -> bool:
            self.click("generate")
            time.sleep(1)
            return condition()

        wait_until(is_done)

    def fill(self, css: str, value: object) -> None:
        self.find(css).send_keys(CONTROL_A)
        self._chromium.execute_cdp_cmd("Input.insertText", {"text": str(value)})  # pasted: keys are slow
        self.find(css).send_keys(TAB)

    def entries(self) -> list[str]:
        """Of the list of checkpoints, opened."""
        found = self._chromium.find_elements("css selector", "[role=option]")
        return [entry.text.removeprefix("✓").strip() for entry in found]

    def choose(self, number: int) -> None:
        self._chromium.find_elements("css selector", "[role=option]")[number].click()


def take_pictures(run: Path, images: Path = IMAGES) -> None:
    """Have the run's two newest checkpoints write side by side, in a window of each size."""
    from tests.browser import chromium

    port = free_port()
    command = [str(BIN / "smoltrain"), "demo", str(run), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline()  # says that it serves
            for name, window in WINDOWS.items():
                with tempfile.TemporaryDirectory() as profile, chromium(Path(profile), *window) as browser:
                    browser.get(f"http://127.0.0.1:{port}")
                    write_side_by_side(PersonAtThePage(browser))
                    browser.execute_script("window.scrollTo(0, 0)")
                    browser.save_screenshot(str(images / f"demo-{name}.png"))
        finally:
            server.kill()


def write_side_by_side(person: PersonAtThePage) -> None:
    """Both texts, whole."""
    person.fill("#prompt textarea", PROMPT)
    person.click("new-seed input")
    person.fill("#seed input", SEED)
    person.click("steps input")
    wait_until(lambda: len(person.entries()) > 1)
    person.choose(1)
    person.click("generate")
    seen: list[list[str]] = []

    def is_whole() -> bool:
        time.sleep(0.5)
        seen.append(person.answers())
        return len(seen[-1]) == 2 and all(seen[-1]) and seen[-6:] == [seen[-1]] * 6

    wait_until(is_whole)


if __name__ == "__main__":
    take_pictures(Path(sys.argv[1]))
