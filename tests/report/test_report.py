"""The page of a run: that it shows what the run says, escapes it, and asks nobody for anything."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from smoltrain.errors import UserError
from smoltrain.report.report import write_run_report
from tests.browser import asked_for, chromium
from tests.report.made_runs import TOKENS, make_run, rewrite_metrics, write_lines
from tests.report_screenshots import SIZES, take_pictures

SCRIPT = "<script>alert('x')</script>&<u>"


class PageReader(HTMLParser):
    """The tags of a page, and its text with blanks between the pieces."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.pieces.append(data.strip())

    @property
    def text(self) -> str:
        return " | ".join(piece for piece in self.pieces if piece)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def test_the_page_says_what_the_run_does(tmp_path: Path):
    page = PageReader(write_run_report(make_run(tmp_path)))
    last = 3 + 6 * math.exp(-11 / 3)
    for shown in (
        "Step 12 of 12, the plan is complete",
        f"Validation loss | {last + 1:.4g} | at step 12, {last / 2:.3f} bits per byte",
        "mean of the last 12 steps",
        f"Tokens | {12 * TOKENS} | 1.20 epochs",
        "Wall time | 8.1 s | 1 start",  # 2 of start, 12 x 0.5 of steps, and 0.1 to the last line
        "Tokens per second | 128 |",
        "MFU | 25.0% |",
        "Peak memory | 1.50 GiB |",
        "Repeat factor | 1.20 |",
        "steps | 6.0 s | 74.1%",
        "main: 1 to 8 | continuation: 9 to 12",
        "step 6 | A at 6 | step 12 | A at 12 | after | B | step 6 | B at 6",
        "model.hidden_size | 256 | 32",  # the recipe's, and the run's
        "ledger.bin | not there",
        "git commit",
    ):
        assert shown in page.text, shown
    headings = re.findall(r"(?<=<h2 id=\")[^\"]+", (tmp_path / "runs" / "quickstart" / "report.html").read_text())
    assert headings == [
        "training", "gradients-by-layer", "speed-and-memory", "data", "samples", "events", "config", "ledger",
        "environment",
    ]  # fmt: skip
    drawn = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert len(drawn) == 13
    assert "Gradient norm of each layer before clipping, by layer over the steps, from 0.4 to 1.2" in drawn


def test_events_are_told(tmp_path: Path):
    run = make_run(tmp_path)
    config = (run / "config.yaml").read_text()
    changes = "[run.stop_after, 'phases.main.lr: 1 -> 2']"
    resumes = f"  - {{time: '2026-11-30T07:49:59+00:00', from_step: 5, ranks: 2, changes: {changes}}}\n"
    resumes += "  - {time: '2026-11-30T08:49:59+00:00', from_step: 8, ranks: 2}\n"
    (run / "config.yaml").write_text(config.partition("# sha256")[0] + resumes)
    spike = {"step": 7, "time_s": 1.7e9, "does": "rewind", "rows": [1, 2], "loss": 99.5, "why": "it is far off"}
    write_lines(run / "spikes.jsonl", [spike])
    write_lines(run / "metrics.undone.jsonl", [{"step": 7, "train/loss_nats_per_token": 1.0}] * 3)
    write_lines(run / "data" / "bad-records.jsonl", [{"source": "data", "place": "x.jsonl:3", "why": "no JSON"}] * 30)
    (run / "logs" / "hang-rank1.txt").write_text("")
    log = ["smoltrain INFO WARNING: twice", "smoltrain INFO WARNING: twice", "DeepSpeed WARNING of others"]
    stamp = "2026-11-30 07:49:04,653"
    (run / "logs" / "rank0.log").write_text(
        "\n".join(f"{stamp} {line}" for line in log) + "\n    WARNING of a sample\n"
    )
    text = PageReader(write_run_report(run)).text
    for shown in (
        "resume | 1 ranks before; phases.main.lr: 1 -> 2 | 5 | 2",
        "phase continuation | - | 8 | 2",
        "rewind | it is far off | 7 | 99.5",
        "3 steps were done again",
        "30 records were not read before the run, the first 20",
        "logs/hang-rank1.txt",
        "2026-11-30 07:49:04 | WARNING: twice | 2",
    ):
        assert shown in text, shown
    assert "of others" not in text
    assert "of a sample" not in text


def test_whatever_a_run_says_is_text(tmp_path: Path):
    more = {f"custom/{SCRIPT}": 1.0, f"gradients/norm_before_clipping/{SCRIPT}": 1.0, "data/ledger": SCRIPT}
    run = make_run(tmp_path, f"track.wandb_notes='{SCRIPT}'".replace("'x'", '"x"'), more=more)
    sample = {"step": 1, "prompt": SCRIPT, "text": f"{SCRIPT}\ud800</pre></body>"}
    write_lines(run / "samples.jsonl", [sample])
    write_lines(run / "spikes.jsonl", [{"step": 1, "does": SCRIPT, "rows": [0, 1], "why": SCRIPT, "loss": SCRIPT}])
    write_lines(run / "data" / "bad-records.jsonl", [{"source": SCRIPT, "place": SCRIPT, "why": SCRIPT}])
    (run / "logs" / "rank0.log").write_text(f"2026-11-30 07:49:04,653 smoltrain INFO WARNING: {SCRIPT}\n")
    (run / "logs" / "choices.json").write_text(json.dumps({"device": SCRIPT}))
    hostile = run.with_name(SCRIPT.replace("/", "-"))
    run.rename(hostile)
    page = PageReader(write_run_report(hostile))
    assert {"script", "u"} & {tag for tag, _ in page.tags} == set()
    assert page.count("body") == 1
    assert page.text.count("<script>alert") >= 14
    assert f"{SCRIPT}?</pre></body>" in page.text, "half a surrogate pair, which is no UTF-8"


def test_the_page_needs_nothing_else(tmp_path: Path):
    page = PageReader(write_run_report(make_run(tmp_path), tmp_path / "out.html"))
    assert {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags} == set()
    policies = [attrs["content"] for tag, attrs in page.tags if tag == "meta" and "http-equiv" in attrs]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    links = {value for _, attrs in page.tags for name, value in attrs.items() if name in ("href", "src") and value}
    targets = {f"#{attrs['id']}" for tag, attrs in page.tags if tag == "h2"}
    assert links == targets
    assert "url(" not in (tmp_path / "out.html").read_text()


def nothing_but_nan(line: dict[str, Any]) -> dict[str, Any]:
    return {name: math.nan if "loss" in name or "norm" in name else value for name, value in line.items()}


def first_step_alone(line: dict[str, Any]) -> dict[str, Any]:
    return line if line["step"] == 1 else {}


def an_older_version(line: dict[str, Any]) -> dict[str, Any]:
    known = ("step", "train/loss_nats_per_token", "train/lr", "speed/tokens_per_s", "speed/step_s")
    return {name: value for name, value in line.items() if name in known} if "train/lr" in line else {}


@pytest.mark.parametrize("change", [nothing_but_nan, first_step_alone, an_older_version])
def test_odd_runs_have_a_page(tmp_path: Path, change: Any):
    run = make_run(tmp_path)
    rewrite_metrics(run, change)
    if change is an_older_version:
        (run / "samples.jsonl").unlink()
        text = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(text.partition("provenance:")[0] + "provenance: {rows_per_step: 4}\n")
    page = PageReader(write_run_report(run))
    assert page.count("svg") >= 2
    assert "NaN" not in str([attrs.get("d") for _, attrs in page.tags])
    assert ("not finite (squares" in page.text) == (change is nothing_but_nan)
    assert ("Samples" in page.text) == (change is not an_older_version)


def test_a_run_that_goes_on_is_read_and_nothing_of_it_changes(tmp_path: Path):
    run = make_run(tmp_path, num_steps=7)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "train/lo')  # a line in the making
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    page = PageReader(write_run_report(run))
    assert "Step 7 of 12, not complete" in page.text
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert after.pop(run / "report.html")
    assert after == before


def test_families_of_later_versions_are_drawn(tmp_path: Path):
    layers = {f"updates/ratio/layers.{number:02d}": 1e-3 for number in range(5)}
    more = {"evaluation/arc_easy/acc": 0.5, "memorisation/share_13": 0.1, **layers}
    page = PageReader(write_run_report(make_run(tmp_path, more=more)))
    drawn = [str(attrs["aria-label"]) for tag, attrs in page.tags if tag == "svg"]
    assert [label for label in drawn if label.startswith(("evaluation", "memorisation", "updates"))] == [
        "evaluation/arc_easy/acc over the steps, last 0.5",
        "memorisation/share_13 over the steps, last 0.1",
        "updates/ratio, by layer over the steps, from 0.001 to 0.001",
    ]


def test_a_run_without_a_step_and_an_out_that_cannot_be_written_are_refused(tmp_path: Path):
    run = make_run(tmp_path)
    with pytest.raises(UserError, match="the report cannot be written"):
        write_run_report(run, tmp_path / "nowhere" / "report.html")
    assert write_run_report(run, tmp_path) == tmp_path / "report.html"
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no step in"):
        write_run_report(run)


MEASURED = """
import sys
from pathlib import Path
from smoltrain.distributed.memory_limits import read_peak_resident_bytes
from smoltrain.report.report import write_run_report
write_run_report(Path(sys.argv[1]))
print(read_peak_resident_bytes() / 2**20)
"""


@pytest.mark.slow
def test_a_run_of_100_000_steps_takes_less_than_500_mib_and_a_small_page(tmp_path: Path):
    run = make_run(tmp_path, "phases.main.steps=90000", "phases.continuation.steps=10000", num_steps=100_000)
    assert (run / "metrics.jsonl").stat().st_size > 50 * 2**20
    done = subprocess.run([sys.executable, "-c", MEASURED, str(run)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 500, "MiB of the whole process, torch and all"
    assert (run / "report.html").stat().st_size < 2 * 2**20
    assert "Step 100,000 of 100,000" in PageReader(run / "report.html").text


@pytest.mark.browser
@pytest.mark.slow
def test_the_page_fits_a_phone_and_a_desk_and_asks_nobody(tmp_path: Path):
    long_words = {"step": 1, "prompt": "w" * 300, "text": "w" * 3000}
    run = make_run(
        tmp_path, more={f"{family}/{'n' * 90}": 1.0 for family in ("custom", "gradients/norm_before_clipping")}
    )
    write_lines(run / "samples.jsonl", [long_words | {"step": step} for step in range(1, 20)])
    path = write_run_report(run)
    for width, height in SIZES.values():
        with chromium(tmp_path / f"profile-{width}", width, height) as browser:
            browser.get(f"file://{path}")
            wide = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
            assert wide <= 0, f"the page is wider than {width}"
            assert browser.execute_script("return document.querySelectorAll('svg path').length") > 20
            assert asked_for(browser) == {f"file://{path}"}
            assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    take_pictures(path, tmp_path)
    assert sorted(png.name for png in tmp_path.glob("*.png")) == ["report-desktop.png", "report-phone.png"]
