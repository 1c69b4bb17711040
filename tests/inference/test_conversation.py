"""A conversation shows the model all of its turns, drops the oldest where the context is full, and keeps an answer."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from smoltrain.config.schema import GenerationSection
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.errors import UserError
from smoltrain.inference import conversation
from smoltrain.inference.chat_template import ChatTemplate, Message, find_chat_template
from smoltrain.inference.conversation import Conversation
from smoltrain.inference.load import LoadedModel, load_trained_model
from tests import folders

ANSWER = " spoke to the queen"
SETTINGS = GenerationSection(max_tokens=20)
Ask = Callable[..., list[str]]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A model that chats, with a context of 64 tokens."""
    folder = tmp_path_factory.mktemp("chat")
    folders.chat(folder, eos_token="<|tool|>")  # which generation_config.json does not name as an end
    tokenizer = Tokenizer.from_folder(folder, folders.SEPARATOR)  # as a run that was trained with it has it
    return replace(load_trained_model(str(folder)), tokenizer=tokenizer)


@pytest.fixture
def shown(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], dict[str, Any]]]:
    """What the model gets with each answer, which is always the same; the checks of its prompt are the real ones."""
    seen: list[tuple[list[int], dict[str, Any]]] = []
    real = conversation.generate_ids

    def instead(model: Any, ids: list[int], settings: GenerationSection, **options: Any) -> Iterator[int]:
        real(model, ids, settings, **options)
        seen.append((ids, options))
        return iter(loaded.tokenizer.encode(ANSWER))

    monkeypatch.setattr(conversation, "generate_ids", instead)
    return seen


def ask(talk: Conversation, written: str) -> list[str]:
    """Have it answer; what was said beside the answer."""
    notes: list[str] = []
    answer = "".join(talk.answer(written, SETTINGS, greedy=False, seed=1, say=notes.append))
    assert answer == ANSWER
    return notes


def template_of(loaded: LoadedModel) -> ChatTemplate:
    template = find_chat_template(loaded.tokenizer)
    assert template
    return template


def test_the_template_gets_all_turns(loaded: LoadedModel, shown: list[Any]):
    talk = Conversation(loaded, template_of(loaded))
    ask(talk, "hi")
    ask(talk, "so")
    messages = [
        Message(role="user", content="hi"), Message(role="assistant", content=ANSWER),
        Message(role="user", content="so"),
    ]  # fmt: skip
    assert [ids for ids, _ in shown] == [template_of(loaded).encode(messages[:1]), template_of(loaded).encode(messages)]
    ends = {loaded.tokenizer.token_to_id(word) for word in ("<|endoftext|>", "<|turn|>", "<|tool|>")}
    assert set(shown[0][1]["stop_ids"]) == ends, "the separator, what its authors named, and the end of a turn"


def test_without_a_template_it_is_one_text(loaded: LoadedModel, shown: list[Any]):
    talk = Conversation(loaded, None)
    for written in ("", "the king", "", "Naples"):
        assert ask(talk, written) == []
    encode = loaded.tokenizer.encode
    assert [ids for ids, _ in shown] == [
        [loaded.tokenizer.separator_id],
        encode(f"{ANSWER}\nthe king"),
        encode(f"{ANSWER}\nthe king{ANSWER}"),
        encode(f"{ANSWER}\nthe king{ANSWER}{ANSWER}\nNaples"),
    ]
    assert set(shown[0][1]["stop_ids"]) == set(loaded.stop_ids)


@pytest.mark.parametrize("by_template", [True, False])
def test_the_oldest_turns_are_dropped_and_it_says_so(loaded: LoadedModel, shown: list[Any], by_template: bool):
    talk = Conversation(loaded, template_of(loaded) if by_template else None)
    notes: list[str] = []
    for letter in "abcde":
        notes += ask(talk, letter * 20 if not by_template else letter)
        assert len(shown[-1][0]) <= 64 - SETTINGS.max_tokens
    assert notes
    assert set(notes) <= {
        "the oldest turn is dropped: the context of 64 tokens is full",
        "the oldest 2 turns are dropped: the context of 64 tokens is full",
    }
    kept = [turn.written[0] for turn in talk.turns]
    assert kept == list("abcde")[-len(kept) :]
    assert len(kept) == 5 - sum(2 if "2 turns" in note else 1 for note in notes)


def test_what_is_refused_changes_nothing(loaded: LoadedModel, shown: list[Any]):
    talk = Conversation(loaded, template_of(loaded))
    ask(talk, "hi")
    for written, says in (("x" * 100, "the prompt is too long"), ("\udce9", "the prompt is not text")):
        with pytest.raises(UserError, match=says):
            ask(talk, written)
    assert [(turn.written, turn.answer) for turn in talk.turns] == [("hi", ANSWER)]


def test_an_answer_that_is_broken_off_is_kept_as_far_as_it_came(loaded: LoadedModel, shown: list[Any]):
    talk = Conversation(loaded, None)
    pieces = talk.answer("a", SETTINGS, greedy=False, seed=1, say=print)
    first = next(pieces)
    pieces.close()
    assert 0 < len(first) < len(ANSWER)
    ask(talk, "b")
    assert shown[-1][0] == loaded.tokenizer.encode(f"a{first}\nb")


def test_the_same_seed_gives_the_same_answer(loaded: LoadedModel):
    """The real sampling, and the cache: what is drawn is what `generate` draws behind the same text."""
    talk = Conversation(loaded, None)
    answer = "".join(talk.answer("the king", SETTINGS, greedy=False, seed=3, say=print))
    assert answer == "".join(loaded.generate_text("the king", SETTINGS, greedy=False, seed=3))
    assert answer
