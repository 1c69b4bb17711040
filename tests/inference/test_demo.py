"""The demo: what its page shows, streams, stops and refuses, through gradio's client and in a real browser."""

from __future__ import annotations

import asyncio
import html
import importlib
import itertools
import re
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

from smoltrain import cli
from smoltrain.config.schema import GenerationSection
from smoltrain.distributed.world import free_port
from smoltrain.errors import BAD_INPUT, DONE, UserError
from smoltrain.inference import load
from smoltrain.inference.demo_models import DemoModels
from smoltrain.inference.load import LoadedModel
from tests import folders
from tests.demo_page import PersonAtThePage, take_pictures
from tests.launches import wait_until

if TYPE_CHECKING:
    from smoltrain.inference import demo

POSITIONS = 4096
SETTINGS = {"temperature": 0.7, "top_k": 30, "top_p": 0.95, "max_tokens": 24}
DEFAULTS = [[12], *SETTINGS.values(), False, False, 1]  # as the page's controls stand, but for the seed, which is kept
PROMPT = "the king of "
HOSTILE_SEED = 13  # with which the model of the browser's test writes HOSTILE
# A page that took a model's text for its own would run one of these scripts, or fill in one of these templates.
HOSTILE = (
    "<script>window.obeyed = 1</script><img src=x onerror='window.obeyed = 2'></mark></pre> & &lt; "
    "${window.obeyed = 3} {{value}} {{{value}}} @children"
)


# Of gradio, which counts its events with pandas' options of last year.
pytestmark = pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")


@pytest.fixture(scope="module", autouse=True)
def import_demo() -> None:
    """Here and not above: gradio takes seconds, and every worker of a test session reads the head of every file."""
    globals()["demo"] = importlib.import_module("smoltrain.inference.demo")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 8, 9 and 12, the last one evaluated, and room for long texts."""
    generation = [f"generation.{key}={value}" for key, value in SETTINGS.items()]
    room = f"model.max_position_embeddings={POSITIONS}"
    made = folders.run(tmp_path_factory.mktemp("demo"), room, *generation, steps=(8, 9, 12))
    folders.evaluate(made, 12, 3.21456)
    return made


@pytest.fixture(scope="module")
def shelf(run: Path) -> DemoModels:
    return DemoModels(str(run))


def within_a_loop(call: Callable[[], Any]) -> Any:
    """The value of call(). Outside of an event loop gradio makes loops of its own and leaves them unclosed."""

    async def inside() -> Any:
        return call()

    return asyncio.run(inside())


def page_of(shelf: DemoModels) -> dict[str, dict[str, Any]]:
    """The page's components by their label."""
    components = within_a_loop(lambda: demo.build_page(shelf).get_config_file()["components"])
    return {part["props"]["label"]: part["props"] for part in components if part["props"].get("label")}


def pretend(shelf: DemoModels, monkeypatch: pytest.MonkeyPatch, **instead: Any) -> None:
    """Until the end of the test its model is another one."""
    monkeypatch.setattr(shelf, "_kept", [replace(shelf.load([12])[0], **instead)])


# --- the page


def test_the_controls_stand_as_the_recipe_says(shelf: DemoModels):
    page = page_of(shelf)
    names = ("Checkpoints, side by side", "Temperature", "Top-k (0 keeps all)", "Top-p", "New tokens at most")
    assert [page[name]["value"] for name in names] == DEFAULTS[:5]
    assert page["New tokens at most"]["maximum"] == POSITIONS - 1
    choices = [("step 12 · validation loss 3.2146", 12), ("step 9", 9), ("step 8", 8)]
    assert [tuple(choice) for choice in page["Checkpoints, side by side"]["choices"]] == choices
    assert page["Prompts of the recipe"]["samples"] == [["**ROMEO**  \n"], ["**KING HENRY**  \n"]]
    assert page["A new seed for each text"]["value"] is True
    assert len({page_of(shelf)["Seed"]["value"] for _ in range(3)}) > 1


def test_settings_beyond_a_slider_move_its_ends(shelf: DemoModels, monkeypatch: pytest.MonkeyPatch):
    far = {"temperature": 3.5, "top_k": 999, "max_tokens": 10**6}
    pretend(shelf, monkeypatch, generation=GenerationSection(**far))
    page = page_of(shelf)
    assert (page["Temperature"]["maximum"], page["Top-k (0 keeps all)"]["maximum"]) == (3.5, 999)
    assert page["New tokens at most"]["value"] == POSITIONS - 1


def test_a_model_without_checkpoints_and_recipe_has_a_page(
    shelf: DemoModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pretend(shelf, monkeypatch, folder=tmp_path / "hub", step=None, manifest=None, config=None)
    monkeypatch.setattr(shelf, "_checkpoints", tmp_path / "checkpoints")  # as of a Hugging Face folder
    page = page_of(shelf)
    assert (page["Checkpoints, side by side"]["visible"], page["Checkpoints, side by side"]["value"]) == (False, [])
    assert "Prompts of the recipe" not in page
    (shown, _) = list(demo.generate_for_page(shelf, PROMPT, [], *DEFAULTS[1:]))[-1]
    assert read_page(shown)[0][:2] == ("hub", PROMPT)


def test_a_broken_checkpoint_is_not_the_chosen_one(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(run, tmp_path / "broken")
    (tmp_path / "broken" / "checkpoints" / "step-00000012" / "model.safetensors").write_bytes(b"no")
    shelf = DemoModels(str(tmp_path / "broken"))
    assert page_of(shelf)["Checkpoints, side by side"]["value"] == [9]
    assert "step 12 is passed over" in capsys.readouterr().err
    with pytest.raises(demo.gr.Error, match="is not whole"):
        next(demo.generate_for_page(shelf, "", *DEFAULTS))
    assert passages(shelf, "", [9])[-1][0][0] == "step 9", "a model that does not load leaves the one before it"


def test_the_headline_names_run_parameters_and_device(shelf: DemoModels):
    number = sum(p.numel() for p in shelf.load()[0].model.parameters())
    components = within_a_loop(lambda: demo.build_page(shelf).get_config_file()["components"])
    (about,) = [part["props"]["value"] for part in components if part["props"].get("elem_id") == "about"]
    assert about == f"## quickstart\n{number:,} parameters · on {shelf.device}"


# --- the texts


def read_page(shown: str) -> list[tuple[str, str, str]]:
    """(Title, prompt, answer) of each passage."""
    found = re.findall(
        r'<article><h4>(.*?)</h4><pre>(?:<span class="prompt">(.*?)</span>)?<mark class="answer">(.*?)</mark></pre>',
        shown, re.DOTALL,
    )  # fmt: skip
    return [(html.unescape(title), html.unescape(prompt), html.unescape(answer)) for title, prompt, answer in found]


def passages(
    shelf: DemoModels, prompt: str, steps: Sequence[int] = (12,), options: Sequence[Any] = DEFAULTS[1:]
) -> list[list[tuple[str, str, str]]]:  # fmt: skip
    return [read_page(shown) for shown, _ in demo.generate_for_page(shelf, prompt, [*steps], *options)]


def answers(shelf: DemoModels, prompt: str, *options: Any) -> list[str]:
    """Those of one checkpoint, as they grow."""
    return [shown[0][2] for shown in passages(shelf, prompt, *options)]


def test_an_answer_grows_beside_its_prompt(shelf: DemoModels):
    seen = passages(shelf, PROMPT)
    assert {(title, prompt) for ((title, prompt, _),) in seen} == {("step 12 · validation loss 3.2146", PROMPT)}
    grown = [answer for ((_, _, answer),) in seen]
    assert len(seen) > 5
    assert all(after.startswith(before) for before, after in itertools.pairwise(grown))
    assert grown == answers(shelf, PROMPT), "one seed, one text"
    assert grown[-1] != answers(shelf, PROMPT, [12], [*DEFAULTS[1:-1], 8])[-1]


def test_a_new_seed_is_shown_and_repeats_the_text(shelf: DemoModels):
    def write(*seed_controls: Any) -> tuple[str, int]:
        options: list[Any] = [[12], *SETTINGS.values(), False, *seed_controls]
        return list(demo.generate_for_page(shelf, PROMPT, *options))[-1]

    shown = [write(True, 1) for _ in range(3)]
    assert len({seed for _, seed in shown}) > 1
    for text, seed in shown:
        assert f"seed <b>{seed}</b>" in text
        assert write(False, seed) == (text, seed)
    assert type(write(False, None)[1]) is int, "an empty box is no seed"


def test_checkpoints_write_side_by_side_what_each_writes_alone(shelf: DemoModels):
    seen = passages(shelf, PROMPT, [8, 12])
    assert [title for title, _, _ in seen[-1]] == ["step 8", "step 12 · validation loss 3.2146"]
    assert all(answer for _, _, answer in seen[3]), "neither waits for the end of the other"
    alone = [answers(shelf, PROMPT, [step])[-1] for step in (8, 12)]
    assert [answer for _, _, answer in seen[-1]] == alone
    assert alone[0] != alone[1]


def test_controls_of_the_page_are_shown_and_not_obeyed(shelf: DemoModels, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        LoadedModel, "generate_text", lambda *_, **__: iter(["\x1b[31m", "\x00\x7f\x85", "\u202e\t\n", "é👩\u200d🔬"])
    )
    ((_, prompt, answer),) = passages(shelf, "a\r")[-1]
    assert (prompt, answer) == ("a␍", "␛[31m␀␡\ufffd\ufffd\t\né👩\u200d🔬")


@pytest.mark.parametrize("prompt", ["", "x"])
def test_a_document_that_ends_at_once_is_no_error(shelf: DemoModels, monkeypatch: pytest.MonkeyPatch, prompt: str):
    monkeypatch.setattr(load, "generate_ids", lambda *_, **__: iter([]))
    assert set(answers(shelf, prompt)) == {""}


# --- through the server


@pytest.fixture
def client(shelf: DemoModels) -> Iterator[Callable[[], Any]]:
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


def test_a_text_streams_to_its_user(client: Callable[[], Any], shelf: DemoModels):
    job = client().submit(PROMPT, *DEFAULTS, api_name="/generate")
    job.result(timeout=60)
    assert [read_page(shown)[0][2] for shown, _ in job.outputs()] == answers(shelf, PROMPT)


def test_two_users_get_their_own_texts(client: Callable[[], Any], shelf: DemoModels):
    asked = [(PROMPT, [12]), ("and ", [8]), ("what news from ", [12])]
    jobs = [client().submit(prompt, steps, *DEFAULTS[1:], api_name="/generate") for prompt, steps in asked]
    for job, (prompt, steps) in zip(jobs, asked, strict=True):
        job.result(timeout=60)
        assert read_page(job.outputs()[-1][0])[0][2] == answers(shelf, prompt, steps)[-1]


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
        (PROMPT, [[3], *DEFAULTS[1:]], "not in the list of choices"),
        (PROMPT, [[12], -0.5, *DEFAULTS[2:]], "less than minimum value 0"),
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


def test_a_checkpoint_that_training_deleted_is_said_in_the_page(shelf: DemoModels):
    with pytest.raises(demo.gr.Error, match="no checkpoint of this step: saw 3, want one of 8, 9, 12"):
        next(demo.generate_for_page(shelf, PROMPT, [3], *DEFAULTS[1:]))


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


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the page is launched with; nobody gives it a share link."""
    options: dict[str, Any] = {}
    page = SimpleNamespace(
        launch=lambda **given: options.update(given), block_thread=lambda: None, share_url=None,
        close=lambda **given: options.update(closed=True),
    )  # fmt: skip
    monkeypatch.setattr(demo, "build_page", lambda _: page)
    return options


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)])
def test_others_are_let_in_only_on_demand(
    run: Path, launched: dict[str, Any], capsys: pytest.CaptureFixture[str], host: str, warned: bool
):
    port = free_port()
    given: dict[str, Any] = {} if host == demo.HOST else {"host": host}
    demo.serve_demo(str(run), **given, port=port)
    out, err = capsys.readouterr()
    assert (launched["server_name"], launched["server_port"], launched["share"]) == (host, port, False)
    assert out == f"{run} on {DemoModels(str(run)).device}: http://{host}:{port} (Ctrl-C ends the demo)\n"
    assert ("lets others in" in err) == warned
    assert "--share" not in err


def test_a_share_link_is_asked_for_by_the_flag_alone_and_warned_of(
    run: Path, launched: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("GRADIO_SHARE", "True")
    port = free_port()
    with pytest.raises(SystemExit) as left:
        cli.main(["demo", str(run), "--port", str(port)])
    assert (left.value.code, launched["share"]) == (DONE, False)
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        cli.main(["demo", str(run), "--port", str(port), "--share"])
    out, err = capsys.readouterr()
    assert (left.value.code, launched["share"], launched["closed"], out) == (BAD_INPUT, True, True, "")
    assert err.splitlines() == [
        demo.SHARE_WARNING,
        "error: there is no share link: saw none of gradio's servers, want the Internet; change --share",
    ]


# --- in a browser


@pytest.fixture
def address(run: Path, tmp_path: Path) -> Iterator[str]:
    """Of a demo in a process of its own, which afterwards a Ctrl-C must end in good order.

    Once it is up the run gets one more checkpoint, as one that is still in training does: that of step 8. With
    HOSTILE_SEED the model writes what a page would obey.
    """
    port = free_port()
    late = run / "checkpoints" / "step-00000008"
    late.rename(tmp_path / late.name)
    code = f"""
import signal, time
from smoltrain.inference import demo, load

whole = load.LoadedModel.generate_text

def slow(self, *arguments, seed, **options):  # as a large model is: a tiny one would end before the page can stop it
    if seed == {HOSTILE_SEED}:
        yield {HOSTILE!r}
        return
    for piece in whole(self, *arguments, seed=seed, **options):
        time.sleep(0.1)
        yield piece

load.LoadedModel.generate_text = slow
load.LoadedModel.stop_ids = property(lambda self: [])  # it ends no document, but where the page has it stop
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


@pytest.mark.slow
@pytest.mark.browser
def test_a_person_writes_stops_and_compares_checkpoints(run: Path, address: str, tmp_path: Path):
    from tests import browser

    with browser.chromium(tmp_path / "profile") as chromium:
        person = PersonAtThePage(chromium)
        chromium.get(address)
        assert "parameters" in person.find("#about").text
        person.fill("#prompt textarea", PROMPT)
        person.click("generate")
        wait_until(lambda: bool(person.answers()))
        wait_until(lambda: person.read("#passages p b") == [str(person.find("#seed input").get_property("value"))])
        person.click("stop")

        person.click("new-seed input")
        person.fill("#seed input", HOSTILE_SEED + 1)
        person.fill("#max-tokens input[type=number]", POSITIONS - 1)
        person.click("generate")
        lengths = set[int]()
        wait_until(lambda: lengths.add(len("".join(person.answers()))) or len(lengths) > 2)  # it grows
        assert person.read("#passages .prompt") == [PROMPT]
        assert person.read("#passages h4") == ["step 12 · validation loss 3.2146"]
        person.click("stop")
        time.sleep(1)  # what was on its way has come
        stopped = person.answers()
        time.sleep(3)
        assert person.answers() == stopped

        person.click("steps input")
        wait_until(lambda: person.entries() == ["step 12 · validation loss 3.2146", "step 9", "step 8"])
        person.choose(2)
        person.click("generate")  # answered only if the long text let go of the one place in the queue
        titles = ["step 12 · validation loss 3.2146", "step 8"]
        wait_until(lambda: person.read("#passages h4") == titles and all(person.answers()))
        person.click("stop")

        person.fill("#seed input", HOSTILE_SEED)
        person.generate_until(lambda: person.answers() == [HOSTILE, HOSTILE])
        assert chromium.execute_script("return window.obeyed") is None

        person.fill("#seed input", HOSTILE_SEED + 1)
        person.fill("#prompt textarea", "king " * POSITIONS)
        person.generate_until(lambda: "the prompt is too long" in " ".join(person.read(".toast-wrap")))
        urls = browser.asked_for(chromium)
        assert urls
        assert {url for url in urls if not url.startswith(f"{address}/")} == set()
        assert [entry for entry in chromium.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.slow
@pytest.mark.browser
def test_the_pictures_of_the_docs_are_taken(run: Path, tmp_path: Path):
    take_pictures(run, tmp_path)
    assert {path.name: path.stat().st_size > 10_000 for path in tmp_path.iterdir()} == {
        "demo-desktop.png": True, "demo-phone.png": True,
    }  # fmt: skip
