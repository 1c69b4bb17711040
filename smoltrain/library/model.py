"""`smoltrain.load` and `smoltrain.Model`: a trained model that writes text and says how likely a text is."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from smoltrain.config.load import override_generation
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.errors import Problem, UserError, format_value
from smoltrain.inference.load import LoadedModel, load_trained_model
from smoltrain.model.interface import LanguageModel
from smoltrain.model.own_model import provide_model


class Model:
    """A trained model in this process, in fp32 on the CPU: what `load` returns."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded

    def __repr__(self) -> str:
        step = "" if self.step is None else f", step={self.step}"
        return f"Model({str(self._loaded.folder)!r}{step})"

    @property
    def module(self) -> LanguageModel:
        """The torch module; `model.module.to("cuda")` moves it."""
        return self._loaded.model

    @property
    def tokenizer(self) -> Tokenizer:
        """With `encode(text)`, which gives ids, and `decode(ids)`."""
        return self._loaded.tokenizer

    @property
    def step(self) -> int | None:
        """Of the checkpoint; None for a Hugging Face folder."""
        return self._loaded.step

    def generate(
        self,
        prompt: str = "",
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        greedy: bool = False,
        seed: int | None = None,
    ) -> str:
        """The text that the model writes behind a prompt, without the prompt; an empty prompt begins a document.

        Args:
            prompt: Text to go on from.
            max_tokens: New tokens at most. This and the next three are the recipe's where they are not given.
            temperature: Divides the logits; 0 is greedy.
            top_k: Keep the k likeliest tokens; 0 keeps all.
            top_p: Keep the likeliest tokens of this probability.
            greedy: Always take the likeliest token.
            seed: Of the draws; the run's if it is not given, so that the same call writes the same text.

        Raises:
            UserError: For a prompt that is too long or no text, and settings out of range.
        """
        pieces = self.stream(
            prompt, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, greedy=greedy, seed=seed
        )
        return "".join(pieces)

    def stream(
        self,
        prompt: str = "",
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        greedy: bool = False,
        seed: int | None = None,
    ) -> Iterator[str]:
        """The same text as `generate`, piece by piece as it is written: `for piece in model.stream("To be"): ...`."""
        options = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        settings = override_generation(self._loaded.generation, **options)
        seed = self._loaded.seed if seed is None else seed
        return self._loaded.generate_text(prompt, settings, greedy=greedy, seed=seed)

    @torch.no_grad()
    def loss(self, text: str) -> float:
        """Mean loss of a text's tokens, in nats per token: how surprised the model is by it.

        The text is a document: before its first token stands the separator. A text longer than the model's context is
        cut into stretches of that many tokens, each of which sees the last token of the one before and no other.

        Raises:
            UserError: For an empty text.
        """
        new_ids = self.tokenizer.encode(text)
        if not new_ids:
            raise UserError(Problem("there is no text", format_value(text), "at least one token", "the text"))
        ids = torch.tensor([self.tokenizer.separator_id, *new_ids], device=self.module.device)
        length = self.module.section.max_position_embeddings
        total = 0.0
        for first in range(0, len(new_ids), length):
            stretch = ids[first : first + length + 1]
            total += float(self.module(stretch[None, :-1], stretch[None, 1:]))
        return total / len(new_ids)


def load(
    source: str | Path, step: int | None = None, *, model: nn.Module | Callable[[], nn.Module] | None = None
) -> Model:
    """A trained model: of a run's newest checkpoint, or that of `step`; or of a Hugging Face folder.

    Args:
        source: The folder of a run, the name of one under runs/, the folder of a checkpoint, or a Hugging Face folder.
        step: Of the checkpoint.
        model: What was given to `train` as `model`, for a run of a model of one's own.

    Raises:
        UserError: For a folder that is none of these, and files that are not as they were written.
    """
    with provide_model(model):
        return Model(load_trained_model(str(source), step))
