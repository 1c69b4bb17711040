"""Who computes what a task asks of a model: one process here, all ranks of a run in training/evaluate_tasks.py."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from smoltrain.config.schema import GenerationSection
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.evaluation.score import Score, Window, plan_batches, score_batch
from smoltrain.inference.generate import generate_ids
from smoltrain.inference.load import LoadedModel
from smoltrain.model.interface import LanguageModel


@dataclass(frozen=True)
class WriteRequest:
    """A text to be gone on with."""

    ids: Sequence[int]
    settings: GenerationSection
    stop_texts: tuple[str, ...]  # what is written ends before the first of them


@dataclass(frozen=True)
class WritingRules:
    """Which ids a model may write, and which end its text."""

    tokenizer: Tokenizer
    stop_ids: Collection[int]
    banned_ids: Sequence[int]
    seed: int


class Judge(Protocol):
    """A model, as a task sees it."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the model."""
        ...

    @property
    def context(self) -> int:
        """Tokens that the model reads at most."""
        ...

    def score(self, windows: Sequence[Window]) -> list[Score]:
        """How likely each is, in their order."""
        ...

    def write(self, requests: Sequence[WriteRequest]) -> list[str]:
        """What the model writes behind each."""
        ...


class LoadedJudge:
    """A trained model in this process."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._model = loaded.model
        self._rules = WritingRules(loaded.tokenizer, loaded.stop_ids, loaded.banned_ids, loaded.seed)
        self.tokenizer = loaded.tokenizer
        self.context = loaded.model.section.max_position_embeddings

    def score(self, windows: Sequence[Window]) -> list[Score]:
        """See Judge."""
        scores: dict[int, Score] = {}
        for places in plan_batches(windows, self._model.section.vocab_size):
            found = score_batch(self._model, [windows[place] for place in places])
            scores.update(zip(places, found, strict=True))
        return [scores[place] for place in range(len(windows))]

    def write(self, requests: Sequence[WriteRequest]) -> list[str]:
        """See Judge."""
        return [write_text(self._model, self._rules, request) for request in requests]


def write_text(model: LanguageModel, rules: WritingRules, request: WriteRequest) -> str:
    """What the model writes behind the ids, up to the first of the stop texts."""
    greedy = request.settings.temperature == 0
    new_ids = generate_ids(
        model, request.ids, request.settings, stop_ids=rules.stop_ids, banned_ids=rules.banned_ids, greedy=greedy,
        seed=rules.seed,
    )  # fmt: skip
    ids: list[int] = []
    text = ""
    for new in new_ids:
        ids.append(new)
        text = rules.tokenizer.decode(ids)
        if any(stop in text for stop in request.stop_texts):
            break
    for stop in request.stop_texts:
        text = text.partition(stop)[0]
    return text
