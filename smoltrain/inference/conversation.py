"""A conversation with a model: its turns, the ids that they are to the model, and what of them fits its context."""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

from smoltrain.config.schema import GenerationSection
from smoltrain.inference.chat_template import ChatTemplate, Message
from smoltrain.inference.generate import decode_stream, generate_ids
from smoltrain.inference.load import LoadedModel, check_prompt_is_text


@dataclass
class Turn:
    """What the user wrote, and what the model has answered so far."""

    written: str
    answer: str = ""


class Conversation:
    """Turns by a chat template; without one they are one text, line after line, which the model goes on with."""

    def __init__(self, loaded: LoadedModel, template: ChatTemplate | None) -> None:
        self.turns: list[Turn] = []
        self._loaded = loaded
        self._template = template

    def answer(
        self, written: str, settings: GenerationSection, *, greedy: bool, seed: int, say: Callable[[str], None]
    ) -> Generator[str, None, None]:  # fmt: skip
        """Pieces of the model's answer as they come; whoever stops asking keeps what was answered until then.

        Where the context is full the oldest turns are dropped, and `say` tells. Without a template, nothing written
        means that the last answer goes on. Errors: UserError, at once, as `LoadedModel.generate_text`; nothing has
        changed then.
        """
        check_prompt_is_text(written)
        turns = list(self.turns)
        if not written and turns and self._template is None:
            last = turns.pop()
            written = last.written + last.answer
        turns.append(Turn(written))
        context = self._loaded.model.section.max_position_embeddings
        room = context - min(settings.max_tokens, context // 2)  # the rest is for the answer
        ids = self._encode(turns)
        num_dropped = 0
        while len(ids) > room and len(turns) > 1:
            del turns[0]
            num_dropped += 1
            ids = self._encode(turns)
        new_ids = generate_ids(
            self._loaded.model, ids, settings, stop_ids=self._stop_ids(), banned_ids=self._loaded.banned_ids,
            greedy=greedy, seed=seed, say=say,
        )  # fmt: skip
        if num_dropped:
            oldest = "the oldest turn is" if num_dropped == 1 else f"the oldest {num_dropped} turns are"
            say(f"{oldest} dropped: the context of {context:,} tokens is full")
        self.turns = turns
        return self._keep_answer(turns[-1], decode_stream(ids, new_ids, self._loaded.tokenizer.decode))

    def _keep_answer(self, turn: Turn, pieces: Iterator[str]) -> Generator[str, None, None]:
        for piece in pieces:
            turn.answer += piece
            yield piece

    def _encode(self, turns: Sequence[Turn]) -> list[int]:
        """The ids of all turns, up to where the last answer begins."""
        if self._template is None:
            text = "\n".join(turn.written + turn.answer for turn in turns)
            return self._loaded.tokenizer.encode(text) or [self._loaded.tokenizer.separator_id]
        messages: list[Message] = []
        for turn in turns:
            messages.append(Message(role="user", content=turn.written))
            messages.append(Message(role="assistant", content=turn.answer))
        return self._template.encode(messages[:-1])

    def _stop_ids(self) -> list[int]:
        """What ends a text, and in a chat the end of a turn: the tokenizer's files call it eos_token."""
        tokenizer = self._loaded.tokenizer
        end_of_turn = tokenizer.token_to_id(tokenizer.companions.token_for_role("eos_token"))
        if self._template is None or end_of_turn is None:
            return self._loaded.stop_ids
        return [*self._loaded.stop_ids, end_of_turn]
