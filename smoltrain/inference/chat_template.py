"""Messages as the ids that a tokenizer's chat template makes of them, so that no message can forge a special token."""

import re
from collections.abc import Sequence
from typing import Any, TypedDict

from smoltrain.data.tokenizers.companions import TOKEN_ROLES, Companions
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.errors import Problem, UserError, exception_message

# Noncharacters, which no text should hold (Unicode 23.7): around the number of a special token that a message spells.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
REPLACED = {ord(OPEN): 0xFFFD, ord(CLOSE): 0xFFFD}
SPELLED = re.compile(f"{OPEN}([0-9]+){CLOSE}")


class Message(TypedDict):
    """One turn of a conversation, as chat templates take it."""

    role: str  # user or assistant
    content: str


class ChatTemplate:
    """The chat template beside a tokenizer, and that tokenizer."""

    def __init__(self, template: str, tokenizer: Tokenizer) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self._special = sorted(tokenizer.special_tokens, key=len, reverse=True)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation, up to where the model's answer begins.

        Those of transformers' apply_chat_template, unless a message spells a special token: here it remains text.
        Errors: UserError where the template refuses the messages, or cannot be read.
        """
        safe = [Message(role=message["role"], content=self._mark_spelled(message["content"])) for message in messages]
        parts = SPELLED.split(self._render(safe))
        ids: list[int] = []
        for place, part in enumerate(parts):
            if place % 2:  # what the group of the pattern held
                ids += self._tokenizer.encode_batch([self._special[int(part)]], [True])[0]
            elif part:
                ids += self._tokenizer.encode_template(part)
        return ids

    def _mark_spelled(self, text: str) -> str:
        """The text with marks in place of the special tokens that it spells."""
        text = text.translate(REPLACED)
        if not self._special:
            return text
        spelled = re.compile("|".join(map(re.escape, self._special)))
        return spelled.sub(lambda found: f"{OPEN}{self._special.index(found[0])}{CLOSE}", text)

    def _render(self, messages: list[Message]) -> str:
        # Templates are written against transformers' own environment, in a sandbox: they are code from elsewhere.
        from transformers.utils.chat_template_utils import render_jinja_template

        roles = {role: self._tokenizer.companions.token_for_role(role) for role in TOKEN_ROLES}
        known: dict[str, Any] = {role: token for role, token in roles.items() if token is not None}
        try:
            texts, _ = render_jinja_template(
                [list(map(dict, messages))], chat_template=self._template, add_generation_prompt=True, **known
            )
        except Exception as error:  # of jinja's many, and whatever the template's own code runs into
            what, want = "the chat template cannot be used", "one that takes turns of user and assistant"
            raise UserError(Problem(what, exception_message(error), want, "the tokenizer, or --plain")) from None
        return texts[0]


def find_chat_template(tokenizer: Tokenizer) -> ChatTemplate | None:
    """The default one of those beside the tokenizer; None where there is none."""
    text = _default_template(tokenizer.companions)
    return None if text is None else ChatTemplate(text, tokenizer)


def _default_template(companions: Companions) -> str | None:
    """tokenizer_config.json holds one text, or several by name."""
    value = companions.tokenizer_config.get("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) and value else None
