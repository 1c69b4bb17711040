"""The chat: lines and commands through a pipe, and a person at a terminal who interrupts it."""

import io
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from smoltrain import cli
from smoltrain.config.schema import MAX_SEED
from smoltrain.errors import BAD_INPUT, DONE, FAULT, INTERRUPTED
from smoltrain.inference import chat, conversation, load
from smoltrain.inference.chat import COMMANDS, HELP, Chat
from tests import folders
from tests.terminals import TerminalSession

Talk = Callable[..., tuple[int, list[str], list[str]]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "talker"
    folders.chat(folder)
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What each answer is asked for: the text, and options and settings; an answer is its number."""
    seen: list[tuple[str, dict[str, Any]]] = []

    def instead(model: Any, ids: list[int], settings: Any, **options: Any) -> Iterator[int]:
        real(model, ids, settings, **options)  # which refuses what it cannot go on from
        seen.append((tokenizer.decode(ids), options | settings.model_dump()))
        return iter(tokenizer.encode(f"answer {len(seen)}"))

    real = conversation.generate_ids
    tokenizer = folders.tokenizer()
    monkeypatch.setattr(conversation, "generate_ids", instead)
    return seen


@pytest.fixture
def talk(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """talk(LINES, words...) is (exit code, stdout's lines, stderr's) of `smoltrain chat` with LINES as stdin."""

    def talk(lines: bytes, *words: str) -> tuple[int, list[str], list[str]]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
        with pytest.raises(SystemExit) as left:
            cli.main(["chat", str(model), "--plain", "--max-tokens", "8", *words])
        assert isinstance(left.value.code, int)
        told = capsys.readouterr()
        return left.value.code, told.out.splitlines(), told.err.splitlines()

    return talk


def test_each_line_gets_an_answer(talk: Talk, drawn: list[Any]):
    code, out, err = talk(b"one\ntwo \\\n 2\n//three\n", "--seed", "7", "--top-k", "5")
    assert (code, out) == (DONE, ["answer 1", "answer 2", "answer 3"])
    texts = ["one", "oneanswer 1\ntwo \n 2", "oneanswer 1\ntwo \n 2answer 2\n/three"]
    assert [text for text, _ in drawn] == texts
    assert [(options["seed"], options["top_k"]) for _, options in drawn] == [(7, 5), (8, 5), (9, 5)]
    assert sum(line.startswith("talker: ") for line in err) == 1
    assert sum("one text, and the model goes on with it" in line for line in err) == 1
    assert "seed 7: the same lines under it get the same answers" in err


def test_the_seed_is_drawn_and_said(talk: Talk, drawn: list[Any]):
    said = {line for _ in range(3) for line in talk(b"one\n")[2] if line.startswith("seed ")}
    assert {int(line.split()[1].rstrip(":")) for line in said} == {options["seed"] for _, options in drawn}
    assert len(said) > 1


def test_commands_are_obeyed(talk: Talk, drawn: list[Any]):
    lines = b"one\n/undo\ntwo\n/undo\n/undo\n/reset\n/temperature 0.5\n"
    lines += b"/top-p\n/max-tokens 9\nthree\n/seed 3\nfour\n/quit\nx"
    code, out, err = talk(lines, "--seed", "7")
    assert (code, out) == (DONE, ["answer 1", "answer 2", "answer 3", "answer 4"])
    assert [text for text, _ in drawn] == ["one", "two", "three", "threeanswer 3\nfour"]
    assert [options["seed"] for _, options in drawn] == [7, 8, 7, 3]
    assert [(options["temperature"], options["max_tokens"]) for _, options in drawn][2:] == [(0.5, 9)] * 2
    said = ["taken back: 'one'", "taken back: 'two'", "nothing to take back", "forgotten; seed 7", "temperature 0.5"]
    said += ["top-p 1.0", "max-tokens 9", "seed 3, of which 0 answers are drawn"]
    assert err[-len(said) :] == said


def test_the_help_names_every_command(talk: Talk):
    assert talk(b"/help\n")[2][-len(HELP.splitlines()) :] == HELP.splitlines()
    assert [line.split()[0] for line in HELP.splitlines() if line.startswith("/")] == [f"/{name}" for name in COMMANDS]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"/rest", "no such command: saw '/rest', want '/reset' (the nearest valid one)"),
        (b"/top-k many", "generation.top_k is not valid: saw 'many', want a whole number; change /top-k"),
        (b"/temperature -1", "generation.temperature is not valid: saw '-1', want greater than or equal to 0"),
        (b"/seed x", f"the seed is not valid: saw 'x', want a whole number, 0 to {MAX_SEED}; change /seed"),
        (b"/seed 9223372036854775808", "the seed is out of range: saw 9223372036854775808"),
        (b"\xe9", "the prompt is not text"),
        (b"x" * 999, "the prompt is too long"),
    ],
)
def test_a_mistake_ends_a_pipe_and_no_conversation(
    talk: Talk, drawn: list[Any], line: bytes, says: str, monkeypatch: pytest.MonkeyPatch
):
    code, _, err = talk(b"hi\n" + line + b"\nhi\n")
    assert code == BAD_INPUT
    assert err[-1].startswith(f"error: {says}")
    real = Chat.__init__

    def on_a_terminal(self: Chat, *arguments: Any, **options: Any) -> None:
        real(self, *arguments, **options)
        self._is_interactive = True

    monkeypatch.setattr(Chat, "__init__", on_a_terminal)
    code, out, err = talk(b"hi\n" + line + b"\nhi\n")  # the end of stdin is what Ctrl-D sends
    assert (code, out[-1]) == (DONE, "> ")
    assert len([answer for answer in out if "answer" in answer]) == 2, "it goes on behind the mistake"
    assert any(told.startswith(f"error: {says[:30]}") for told in err)


def test_a_seed_out_of_range_is_refused_at_once(talk: Talk):
    code, out, err = talk(b"hi\n", "--seed", str(2**63))
    assert (code, out) == (BAD_INPUT, [])
    assert err[-1].startswith("error: the seed is out of range: saw 9223372036854775808")


def test_an_empty_answer_is_told(talk: Talk, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(conversation, "generate_ids", lambda *_, **__: iter([]))
    code, out, err = talk(b"hi\n")
    assert (code, out, err[-1]) == (
        DONE, [""], "the model ended its answer at once; another seed may write more",
    )  # fmt: skip


def test_where_nobody_takes_the_answers_it_ends(talk: Talk, drawn: list[Any], monkeypatch: pytest.MonkeyPatch):
    for lost, answers in (("stderr cannot be written to", 2), ("stdout cannot be written to", 1)):
        drawn.clear()
        monkeypatch.setattr(chat, "take_console_warnings", lambda lost=lost: iter([lost]))
        code = talk(b"one\ntwo\n")[0]
        assert (code, len(drawn)) == (DONE if answers == 2 else FAULT, answers)


def test_with_a_template_turns_are_encoded_by_it(model: Path, drawn: list[Any]):
    talking = Chat(load.load_trained_model(str(model)), load.GenerationSection(max_tokens=8), seed=1)
    talking._take("hi")
    talking._take("")  # no turn
    talking._take("so")
    assert [text for text, _ in drawn] == ["user: hi\n", "user: hi\nassistant: answer 1\nuser: so\n"]


ENDLESS = """
import sys, time
from smoltrain import cli
from smoltrain.inference import conversation
from tests import folders

def endless(model, ids, settings, **options):
    yield from folders.tokenizer().encode("\\x1b[31mred\\x07 ")
    while True:
        time.sleep(0.01)
        yield from folders.tokenizer().encode("word ")

conversation.generate_ids = endless
cli.main()
"""


@pytest.mark.slow
def test_a_person_interrupts_answers_and_leaves(model: Path):
    command = [sys.executable, "-c", ENDLESS, "chat", str(model), "--seed", "7"]
    root = str(Path(__file__).parents[2])
    session = TerminalSession(command, model.parent, 100, 24, PYTHONPATH=root, OMP_NUM_THREADS="1")
    session.read_until(lambda raw: "> " in raw)
    for number in (1, 2):
        session.press(b"hello\n")
        session.read_until(lambda raw, n=number: raw.count("␛[31mred␇ word word") == n)
        session.press(b"\x03")
        session.read_until(lambda raw, n=number: raw.count("stopped") == n and raw.endswith("> "))
    session.press(b"/undo\n")
    session.read_until(lambda raw: "taken back: 'hello'" in raw and raw.endswith("> "))
    time.sleep(1)  # what comes between the prompt and Python's wait for a line is noticed at the next key
    session.press(b"\x03")
    assert session.finish() == INTERRUPTED
    assert "Traceback" not in session.raw
    assert "\x1b[31m" not in session.raw
    assert "\x07" not in session.raw
