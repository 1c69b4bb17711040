"""The demo: what its page shows, streams, stops and refuses, through gradio's client and in a real browser."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from smoltrain.config.schema import GenerationSection
from smoltrain.distributed.world import free_port
from smoltrain.errors import DONE, UserError
from smoltrain.inference import load
from smoltrain.inference.load import LoadedModel, load_trained_model
from tests import tiny
from tests.launches import wait_until

if TYPE_CHECKING:
    from smoltrain.inference import demo

POSITIONS = 4096
SETTINGS = {"temperature": 0.7, "top_k": 30, "top_p": 0.95, "max_tokens": 24}
DEFAULTS = [12, *SETTINGS.values(), False, 1]  # as the page's controls stand, from the checkpoint to the seed
PROMPT = "the king of "


# Of gradio, which counts its events with pandas' options of last year.
pytestmark = pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")


@pytest.fixture(scope="module", autouse=True)
def import_demo() -> None:
    """Here and not above: gradio takes seconds, and every worker of a test session reads the head of every file."""
    globals()["demo"] = importlib.import_module("smoltrain.inference.demo")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run with checkpoints of steps 8, 9 and 12, and room for long texts."""
    folder = tmp_path_factory.mktemp("demo")
    generation = [f"generation.{key}={value}" for key, value in SETTINGS.items()]
    done = tiny.train(folder, f"model.max_position_embeddings={POSITIONS}", "run.seed=7", *generation)
    assert done.returncode == DONE, done.stderr
    return folder / "runs" / "quickstart"


@pytest.fixture(scope="module")
def shelf(run: Path) -> demo.DemoModels:
    return demo.DemoModels(str(run))


def within_a_loop(call: Callable[[], Any]) -> Any:
    """The value of call(). Outside of an event loop gradio makes loops of its own and leaves them unclosed."""

    async def inside() -> Any:
        return call()

    return asyncio.run(inside())


def page_of(shelf: demo.DemoModels) -> dict[str, dict[str, Any]]:
    """The page's components by their label."""
    components = within_a_loop(lambda: demo.build_page(shelf).get_config_file()["components"])
    return {part["props"]["label"]: part["props"] for part in components if part["props"].get("label")}


# --- the page


def test_the_controls_stand_as_the_recipe_says(shelf: demo.DemoModels):
    page = page_of(shelf)
    names = ("Checkpoint", "Temperature", "Top-k (0 keeps all)", "Top-p", "New tokens at most")
    assert [page[name]["value"] for name in names] == DEFAULTS[:5]
    assert page["Seed"]["value"] == 7
    assert page["New tokens at most"]["maximum"] == POSITIONS - 1
    assert [step for _, step in page["Checkpoint"]["choices"]] == [12, 9, 8]
    assert page["Prompts of the recipe"]["samples"] == [["**ROMEO**  \n"], ["**KING HENRY**  \n"]]


def test_settings_beyond_a_slider_move_its_ends(shelf: demo.DemoModels, monkeypatch: pytest.MonkeyPatch):
    loaded = shelf.load()
    far = loaded.generation.model_copy(update={"temperature": 3.5, "top_k": 999, "max_tokens": 10**6})
    monkeypatch.setattr(shelf, "_last", replace(loaded, generation=far))
    page = page_of(shelf)
    assert (page["Temperature"]["maximum"], page["Top-k (0 keeps all)"]["maximum"]) == (3.5, 999)
    assert page["New tokens at most"]["value"] == POSITIONS - 1


def test_a_model_without_checkpoints_and_recipe_has_a_page(
    shelf: demo.DemoModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    hub = replace(shelf.load(), folder=tmp_path, step=None, manifest=None, config=None)  # as of a Hugging Face folder
    monkeypatch.setattr(shelf, "_last", hub)
    page = page_of(shelf)
    assert (page["Checkpoint"]["visible"], page["Checkpoint"].get("value")) == (False, None)
    assert "Prompts of the recipe" not in page
    told = list(demo.generate_for_page(shelf, PROMPT, None, *DEFAULTS[1:]))
    assert told[-1][0].startswith(PROMPT)
    assert "step" not in told[-1][1]


def test_a_broken_checkpoint_is_not_the_chosen_one(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(run, tmp_path / "broken")
    (tmp_path / "broken" / "checkpoints" / "step-00000012" / "model.safetensors").write_bytes(b"no")
    shelf = demo.DemoModels(str(tmp_path / "broken"))
    assert page_of(shelf)["Checkpoint"]["value"] == 9
    assert "step 12 is passed over" in capsys.readouterr().err
    with pytest.raises(demo.gr.Error, match="is not whole"):
        next(demo.generate_for_page(shelf, "", *DEFAULTS))
    told = list(demo.generate_for_page(shelf, "", 9, *DEFAULTS[1:]))
    assert "step 9 " in told[-1][1], "a model that does not load leaves the one before it"


def test_the_facts_name_run_parameters_step_and_device(shelf: demo.DemoModels):
    number = sum(p.numel() for p in shelf.load().model.parameters())
    assert demo.describe_model(shelf.load(), shelf.device) == (
        f"## quickstart\n{number:,} parameters · step {shelf.load().step} · on {shelf.device}"
    )


# --- the text


def texts(shelf: demo.DemoModels, prompt: str, options: Sequence[Any] = DEFAULTS) -> list[str]:
    return [text for text, _ in demo.generate_for_page(shelf, prompt, *options)]


def test_a_text_begins_with_the_prompt_and_grows(shelf: demo.DemoModels):
    seen = texts(shelf, PROMPT)
    assert seen[0].startswith(PROMPT)
    assert len(seen) > 5
    assert all(after.startswith(before) for before, after in itertools.pairwise(seen))
    assert seen == texts(shelf, PROMPT), "one seed, one text"
    assert seen[-1] != texts(shelf, PROMPT, [*DEFAULTS[:-1], 8])[-1]


def test_a_checkpoint_is_loaded_when_it_is_asked_for_and_kept(run: Path, monkeypatch: pytest.MonkeyPatch):
    loads: list[int | None] = []

    def counted(source: str, step: int | None) -> LoadedModel:
        loads.append(step)
        return load_trained_model(source, step)

    monkeypatch.setattr(demo, "load_trained_model", counted)
    shelf = demo.DemoModels(str(run))
    told = {step: list(demo.generate_for_page(shelf, PROMPT, step, *DEFAULTS[1:]))[-1] for step in (12, 8, 8)}
    assert loads == [None, 8]
    assert told[8][0] != told[12][0]
    assert "step 8 " in told[8][1]


def test_controls_of_the_page_are_shown_and_not_obeyed(shelf: demo.DemoModels, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        LoadedModel, "generate_text", lambda *_, **__: iter(["\x1b[31m", "\x00\x7f\x85", "\u202e\t\n", "é👩\u200d🔬"])
    )
    assert texts(shelf, "a\r")[-1] == "a␍␛[31m␀␡\ufffd\ufffd\t\né👩\u200d🔬"


@pytest.mark.parametrize("prompt", ["", "x"])
def test_a_document_that_ends_at_once_is_no_error(shelf: demo.DemoModels, monkeypatch: pytest.MonkeyPatch, prompt: str):
    monkeypatch.setattr(load, "generate_ids", lambda *_, **__: iter([]))
    assert set(texts(shelf, prompt)) == {prompt}


# --- through the server


@pytest.fixture
def client(shelf: demo.DemoModels) -> Iterator[Callable[[], Any]]:
    """client() is one more user of a server in this process."""
    from gradio_client import Client

    port = free_port()

    def launched() -> demo.gr.Blocks:
        page = demo.build_page(shelf)
        page.launch(server_name="127.0.0.1", server_port=port, share=False, quiet=True, prevent_thread_lock=True)
        return page

    page = within_a_loop(launched)
    yield lambda: Client(f"http://127.0.0.1:{port}", verbose=False, analytics_enabled=False)
    page.close(verbose=False)


def test_a_text_streams_to_its_user(client: Callable[[], Any], shelf: demo.DemoModels):
    job = client().submit(PROMPT, *DEFAULTS, api_name="/generate")
    job.result(timeout=60)
    assert [text for text, _ in job.outputs()] == texts(shelf, PROMPT)


def test_two_users_get_their_own_texts(client: Callable[[], Any], shelf: demo.DemoModels):
    asked = [(PROMPT, DEFAULTS), ("and ", [8, *DEFAULTS[1:]]), ("what news from ", DEFAULTS)]
    jobs = [client().submit(prompt, *options, api_name="/generate") for prompt, options in asked]
    for job, (prompt, options) in zip(jobs, asked, strict=True):
        job.result(timeout=60)
        assert job.outputs()[-1][0] == texts(shelf, prompt, options)[-1]


def test_stop_ends_the_generator(client: Callable[[], Any], monkeypatch: pytest.MonkeyPatch):
    seen, ended = [], []

    def endless(*_: Any, **__: Any) -> Iterator[int]:
        try:
            while True:
                seen.append(1)
                time.sleep(0.01)
                yield 40
        finally:
            ended.append(len(seen))

    monkeypatch.setattr(load, "generate_ids", endless)
    job = client().submit("", *DEFAULTS, api_name="/generate")
    wait_until(lambda: len(job.outputs()) > 3)
    job.cancel()
    wait_until(lambda: bool(ended))
    assert ended == [len(seen)]


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        ("king " * POSITIONS, DEFAULTS, f"^the prompt is too long: saw .*, want fewer than .*{POSITIONS}; change"),
        (PROMPT, [3, *DEFAULTS[1:]], "not in the list of choices"),
        (PROMPT, [12, -0.5, *DEFAULTS[2:]], "less than minimum value 0"),
    ],
)
def test_what_cannot_be_is_said_in_the_page(
    client: Callable[[], Any], prompt: str, options: list[Any], says: str, capfd: pytest.CaptureFixture[str]
):
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError, match=says) as told:
        client().submit(prompt, *options, api_name="/generate").result(timeout=60)
    assert "Traceback" not in str(told.value)
    if options == DEFAULTS:  # the controls let nobody ask for the others; gradio itself refuses and logs them
        assert "Traceback" not in "".join(capfd.readouterr())


def test_a_checkpoint_that_training_deleted_is_said_in_the_page(shelf: demo.DemoModels):
    with pytest.raises(demo.gr.Error, match="no checkpoint of this step: saw 3, want one of 8, 9, 12"):
        next(demo.generate_for_page(shelf, PROMPT, 3, *DEFAULTS[1:]))


# --- serving


def test_a_port_in_use_is_a_mistake_of_the_user():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = rf"cannot be served there: saw 127.0.0.1:{port} \(Address .*in use.*\), want a free port; .*--port"
        with pytest.raises(UserError, match=line):
            demo.serve_demo("never looked for", port=port)


def test_a_host_that_is_not_this_machine_is_a_mistake_of_the_user():
    with pytest.raises(UserError, match=r"saw 192\.0\.2\.1:7861 \("):
        demo.serve_demo("never looked for", host="192.0.2.1", port=7861)


def test_without_a_run_there_is_no_demo(tmp_path: Path):
    with pytest.raises(UserError, match="no such run"):
        demo.serve_demo(str(tmp_path), port=free_port())


def test_without_gradio_the_mistake_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "smoltrain.inference.demo")
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"want `pip install -e \"\.\[demo\]\"` in a checkout"):
        importlib.import_module("smoltrain.inference.demo")


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)])
def test_others_are_let_in_only_on_demand(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], host: str, warned: bool
):
    launched: dict[str, Any] = {}
    page = SimpleNamespace(launch=lambda **options: launched.update(options), block_thread=lambda: None)
    monkeypatch.setattr(demo, "build_page", lambda _: page)
    port = free_port()
    demo.serve_demo(str(run), **({} if host == demo.HOST else {"host": host}), port=port)
    out, err = capsys.readouterr()
    assert (launched["server_name"], launched["server_port"], launched["share"]) == (host, port, False)
    assert out == f"{run} on {demo.DemoModels(str(run)).device}: http://{host}:{port} (Ctrl-C ends the demo)\n"
    assert ("lets others in" in err) == warned


# --- in a browser


@pytest.fixture
def address(run: Path, tmp_path: Path) -> Iterator[str]:
    """Of a demo in a process of its own, which afterwards a Ctrl-C must end in good order.

    Once it is up the run gets one more checkpoint, as one that is still in training does: that of step 8.
    """
    port = free_port()
    late = run / "checkpoints" / "step-00000008"
    late.rename(tmp_path / late.name)
    code = f"""
import signal, time
from smoltrain.inference import demo, load

whole = load.LoadedModel.generate_text

def slow(self, *arguments, **options):  # as a large model is: a tiny one would end before the page can stop it
    for piece in whole(self, *arguments, **options):
        time.sleep(0.1)
        yield piece

load.LoadedModel.generate_text = slow
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
demo.serve_demo({str(run)!r}, port={port})
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert server.stderr is not None
            told = server.stdout.readline()
            assert f"http://127.0.0.1:{port}" in told, server.stderr.read()
            (tmp_path / late.name).rename(late)
            yield f"http://127.0.0.1:{port}"
            server.send_signal(signal.SIGINT)
            assert (server.wait(30), server.stderr.read()) == (DONE, "")
        finally:
            server.kill()


def talkative(run: Path) -> int:
    """A seed with which the model does not end its document soon: half a minute at the pace of the page's model."""
    loaded, long = load_trained_model(str(run)), GenerationSection(**SETTINGS | {"max_tokens": 300})

    def pieces(seed: int) -> int:
        return sum(1 for _ in loaded.generate_text(PROMPT, long, greedy=False, seed=seed))

    return next(seed for seed in itertools.count() if pieces(seed) > 250)


@pytest.mark.slow
@pytest.mark.browser
def test_a_person_writes_stops_and_changes_the_checkpoint(run: Path, address: str, tmp_path: Path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.remote.webelement import WebElement

    from tests import browser

    with browser.chromium(tmp_path / "profile") as chromium:

        def find(css: str) -> WebElement:
            wait_until(lambda: bool(chromium.find_elements(By.CSS_SELECTOR, css)))
            return chromium.find_element(By.CSS_SELECTOR, css)

        def text() -> str:
            return str(find("#text textarea").get_property("value"))

        def fill(css: str, value: str) -> None:
            find(css).send_keys(Keys.CONTROL, "a")
            chromium.execute_cdp_cmd("Input.insertText", {"text": value})  # pasted: keys are slow for a long text

        chromium.get(address)
        assert "step 12" in find("#about").text
        fill("#prompt textarea", PROMPT)
        fill("#seed input", str(talkative(run)))
        find("#seed input").send_keys(Keys.TAB)
        find("#generate").click()
        wait_until(lambda: len(text()) > len(PROMPT) + 10)
        assert text().startswith(PROMPT)
        chromium.save_screenshot(str(tmp_path / "demo.png"))

        fill("#max-tokens input[type=number]", str(POSITIONS - 1))
        find("#max-tokens input[type=number]").send_keys(Keys.TAB)
        find("#generate").click()
        lengths = set[int]()
        wait_until(lambda: lengths.add(len(text())) or len(lengths) > 2)  # it grows: a busy browser paints rarely
        find("#stop").click()
        time.sleep(1)  # what was on its way has come
        stopped = text()
        time.sleep(3)
        assert text() == stopped

        find("#step input").click()

        def entries() -> list[str]:
            found = chromium.find_elements(By.CSS_SELECTOR, "[role=option]")
            return [entry.text.removeprefix("✓").strip() for entry in found]

        wait_until(lambda: entries() == ["step 12", "step 9", "step 8"])
        chromium.find_elements(By.CSS_SELECTOR, "[role=option]")[2].click()
        find("#generate").click()  # answered only if the long text let go of the one place in the queue
        wait_until(lambda: "step 8" in find("#about").text)
        find("#stop").click()

        fill("#prompt textarea", "king " * POSITIONS)

        def is_refused() -> bool:
            find("#generate").click()  # once more where the page was still busy with the stop
            time.sleep(1)
            return "the prompt is too long" in find(".toast-wrap").text

        wait_until(is_refused)
        chromium.save_screenshot(str(tmp_path / "refused.png"))

        urls = browser.asked_for(chromium)
        assert urls
        assert {url for url in urls if not url.startswith(f"{address}/")} == set()
        assert [entry for entry in chromium.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert (tmp_path / "demo.png").stat().st_size > 10_000
