"""A conversation on a terminal, or line by line through a pipe: `smoltrain chat`.

Answers go to stdout, everything else to stderr. Answer number n is drawn with the seed of the chat plus n - 1, so that
the same lines give the same answers, and a line that is taken back and written again gets another one.
"""

import contextlib
import io
import sys
from collections.abc import Callable
from dataclasses import replace

from smoltrain.config.load import override_generation
from smoltrain.config.schema import MAX_SEED, GenerationSection
from smoltrain.console import take_console_warnings
from smoltrain.errors import Problem, TrainingStopped, UserError, format_error, format_value, suggest_choice
from smoltrain.inference.chat_template import find_chat_template
from smoltrain.inference.conversation import Conversation
from smoltrain.inference.generate import check_seed
from smoltrain.inference.load import LoadedModel
from smoltrain.model.build import count_parameters
from smoltrain.terminal import WARNING_STYLE, open_console, print_text, show_control_characters

HELP = """\
/reset           forget the conversation, and draw from the first seed again
/undo            take the last turn back
/seed N          draw the next answers from this seed on
/temperature X   divides the logits; 0 takes the likeliest token
/top-k N         keep the k likeliest tokens; 0 keeps all
/top-p P         keep the likeliest tokens of this probability
/max-tokens N    tokens of an answer at most
/help            this list; a setting without its value says what it is
/quit            end, as Ctrl-D does; Ctrl-C stops an answer, and ends where none is being written
A line that ends in \\ goes on in the next one. //... is the text /..."""
SETTINGS = ("temperature", "top-k", "top-p", "max-tokens")
COMMANDS = ("reset", "undo", "seed", *SETTINGS, "help", "quit")


class Chat:
    """Reads lines, answers them, obeys commands."""

    def __init__(self, loaded: LoadedModel, settings: GenerationSection, *, seed: int, plain: bool = False) -> None:
        """`plain` leaves the tokenizer's chat template aside. Errors: UserError for a seed out of range."""
        check_seed(seed, "--seed")
        template = None if plain else find_chat_template(loaded.tokenizer)
        self._is_one_text = template is None
        self._conversation = Conversation(loaded, template)
        self._loaded = loaded
        self._settings = settings
        self._seed = seed
        self._num_answers = 0
        self._is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._errors = open_console(sys.stderr)

    def run(self) -> None:
        """Until stdin ends, or /quit. Errors: KeyboardInterrupt where no answer is being written; UserError in a pipe.

        On a terminal a mistake is said, and the conversation goes on. TrainingStopped where stdout is lost, and for
        logits that are no numbers.
        """
        self._say_beginning()
        try:
            while (line := self._read_message()) is not None and line != "/quit":
                try:
                    self._take(line)
                except UserError as error:
                    if not self._is_interactive:
                        raise
                    self._say(format_error(error), WARNING_STYLE)
        except KeyboardInterrupt:
            self._say("")
            raise

    def _say_beginning(self) -> None:
        step = "" if self._loaded.step is None else f", step {self._loaded.step:,}"
        self._say(f"{self._loaded.folder.name}{step}: {count_parameters(self._loaded.model):,} parameters")
        if self._is_one_text:
            self._say("without a chat template your lines and its answers are one text, and the model goes on with it")
            self._say("an empty line lets it go on where it ended")
        else:
            self._say("with the tokenizer's chat template; --plain goes on with the text instead")
        self._say(f"seed {self._seed}: the same lines under it get the same answers")
        if self._is_interactive:
            self._say("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends")

    # ---- lines

    def _read_message(self) -> str | None:
        """What the user writes; None at the end of stdin."""
        line = self._read_line("> ")
        while line is not None and line.endswith("\\"):
            line = f"{line[:-1]}\n{self._read_line('. ') or ''}"
        return line

    def _read_line(self, prompt: str) -> str | None:
        try:
            return input(prompt if self._is_interactive else "")
        except EOFError:
            if self._is_interactive:
                self._say("")  # where ^D stands
            return None

    def _take(self, line: str) -> None:
        if line.startswith("/") and not line.startswith("//"):
            self._obey(line)
        elif line or self._is_one_text:
            self._answer(line.removeprefix("/") if line.startswith("//") else line)

    def _answer(self, written: str) -> None:
        notes: list[str] = []
        seed = (self._seed + self._num_answers) % (MAX_SEED + 1)
        pieces = self._conversation.answer(written, self._settings, greedy=False, seed=seed, say=notes.append)
        self._num_answers += 1
        is_empty = True
        try:
            for piece in pieces:
                self._say_all(notes)
                print(show_control_characters(piece, sys.stdout), end="", flush=True)
                is_empty = is_empty and not piece
        except KeyboardInterrupt:
            if not self._is_interactive:
                raise
            notes.append("stopped")
            is_empty = False
        print(flush=True)
        if is_empty:
            notes.append("the model ended its answer at once; another seed may write more")
        self._say_all(notes)
        if any("stdout" in lost for lost in take_console_warnings()):  # as `| head -1` leaves it
            raise TrainingStopped("nobody takes the answers any more: stdout cannot be written to")

    # ---- commands

    def _obey(self, line: str) -> None:
        name, _, value = line.removeprefix("/").partition(" ")
        value = value.strip()
        if name not in COMMANDS:
            want = suggest_choice(f"/{name}", [f"/{command}" for command in COMMANDS])
            raise UserError(Problem("no such command", format_value(line), want, "the line, or // for a text"))
        if name in SETTINGS:
            self._set(name, value)
            return
        obey: dict[str, Callable[[str], None]] = {"reset": self._reset, "undo": self._undo, "seed": self._set_seed}
        obey.get(name, lambda _: self._say(HELP))(value)

    def _reset(self, _: str) -> None:
        self._conversation.turns.clear()
        self._num_answers = 0
        self._say(f"forgotten; seed {self._seed}")

    def _undo(self, _: str) -> None:
        if not self._conversation.turns:
            self._say("nothing to take back")
            return
        turn = self._conversation.turns.pop()
        self._say(f"taken back: {format_value(turn.written)}")

    def _set_seed(self, value: str) -> None:
        if value:
            if not (value.isascii() and value.isdigit()):
                want = f"a whole number, 0 to {MAX_SEED}"
                raise UserError(Problem("the seed is not valid", format_value(value), want, "/seed"))
            check_seed(int(value), "/seed")
            self._seed = int(value)
            self._num_answers = 0
        self._say(f"seed {self._seed}, of which {self._num_answers} answers are drawn")

    def _set(self, name: str, value: str) -> None:
        key = name.replace("-", "_")
        if value:
            try:
                self._settings = override_generation(self._settings, **{key: value})
            except UserError as error:
                raise UserError(*(replace(problem, change=f"/{name}") for problem in error.problems)) from None
        self._say(f"{name} {getattr(self._settings, key)}")

    # ---- what is said beside the answers

    def _say(self, text: str, style: str = "dim") -> None:
        print_text(text, self._errors, style=style if self._is_interactive else "")

    def _say_all(self, notes: list[str]) -> None:
        for note in notes:
            self._say(note)
        notes.clear()


def prepare_stdin() -> None:
    """Line editing on a terminal, where Python has it; bytes that are no UTF-8 are refused later, readably."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - which `input` uses from now on
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
