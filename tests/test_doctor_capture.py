"""The picture of docs/doctor.md is of this version: every check stands there, and the three mistakes are found."""

import xml.etree.ElementTree as ET
from pathlib import Path

from smoltrain.config.load import load_config
from smoltrain.doctor.machine import list_machine_checks
from smoltrain.training.preflight import check_recipe
from tests.doctor_capture import COLUMNS, MISTAKES, PICTURE, draw_terminal

SVG = "{http://www.w3.org/2000/svg}"
ROOT = Path(__file__).parent.parent


def test_the_picture_shows_every_check_and_what_was_wrong() -> None:
    lines = [text.text or "" for text in ET.parse(PICTURE).getroot().iter(f"{SVG}text")]
    assert max(map(len, lines)) <= COLUMNS
    found = [line for line in lines if line.split(" ")[0] in ("ok", "warning", "fault")]
    names = [check.name for check in list_machine_checks(load_config("quickstart"), None, check_recipe)]
    assert [line[9:26].strip() for line in found] == names
    wrong = "\n".join(lines)
    for name, value in MISTAKES.items():
        assert f"{name}={value}" in wrong or value in wrong
    assert [line[9:26].strip() for line in found if line.startswith("fault")] == ["all-reduce"]


def test_what_a_terminal_shows_is_text_in_the_picture() -> None:
    drawn = draw_terminal(["$ x", "fault    a  <script>&", "         -> mend", "ok       b", ""])
    texts = list(ET.fromstring(drawn).iter(f"{SVG}text"))
    assert [text.text for text in texts] == ["$ x", "fault    a  <script>&", "         -> mend", "ok       b"]
    assert texts[1].get("fill") == texts[2].get("fill") != texts[3].get("fill")


def test_the_page_lists_every_check() -> None:
    page = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    for check in list_machine_checks(load_config("quickstart"), None, check_recipe):
        assert f"`{check.name}`" in page
