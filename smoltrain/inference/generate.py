"""Text from the model, one token at a time: sampling, the KV cache, ids as text.

Legend: B batch (1 here), T tokens, V vocabulary.
"""

import numbers
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from smoltrain.config.schema import MAX_SEED, GenerationSection
from smoltrain.errors import Problem, TrainingStopped, UserError, format_value
from smoltrain.model.interface import LanguageModel, eval_mode

MAX_DRAWN_SEED = 999_999  # short enough to be typed again


def draw_seed() -> int:
    """A seed that nobody chose, for texts that shall differ from time to time."""
    return secrets.randbelow(MAX_DRAWN_SEED + 1)


def check_seed(seed: int, change: str = "the seed") -> None:
    """Errors: UserError for one out of range, and for what is no whole number."""
    if not isinstance(seed, numbers.Integral) or not 0 <= seed <= MAX_SEED:
        raise UserError(Problem("the seed is out of range", format_value(seed), f"0 to {MAX_SEED}", change))


def sample_token(logits_V: Tensor, settings: GenerationSection, greedy: bool, generator: torch.Generator) -> int:
    """One id: the likeliest if greedy or at temperature 0, else drawn by temperature, then top-k, then top-p.

    Top-k keeps the k likeliest tokens (Fan et al. 2018), top-p the smallest set of likeliest tokens whose probability
    reaches p (nucleus sampling, Holtzman et al. 2020). `generator` is on the CPU.
    """
    logits_V = logits_V.detach().cpu().double()  # on the CPU one seed gives one text, whatever the device
    if greedy or settings.temperature == 0:
        return int(logits_V.argmax())
    logits, ids = logits_V.sort(descending=True, stable=True)
    if settings.top_k:
        logits = logits[: settings.top_k]
    probabilities = ((logits - logits[0]) / settings.temperature).softmax(0)  # no temperature is so low as to overflow
    if settings.top_p < 1:
        before = probabilities.cumsum(0)[:-1]  # what the likelier tokens hold, from the second token on
        probabilities = probabilities[: 1 + int((before < settings.top_p).sum())]
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


def generate_ids(
    model: LanguageModel, prompt_ids: Sequence[int], settings: GenerationSection, *,
    stop_ids: Collection[int] = (), banned_ids: Sequence[int] = (), greedy: bool = False, seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[int]:  # fmt: skip
    """Yield new ids until one of `stop_ids` (not yielded), settings.max_tokens, or the last position of the model.

    If it is the position that ends it, `say` tells. `banned_ids` but `stop_ids` are never drawn. Neither torch's random
    state nor the model's training mode changes.
    Errors: UserError, at once, for a prompt that is empty or leaves no position free, and for a seed out of range;
    TrainingStopped where the model's logits are no numbers.
    """
    free = model.section.max_position_embeddings - len(prompt_ids)
    if not prompt_ids:
        raise UserError(Problem("the prompt is empty", "no tokens", "at least one token", "the prompt"))
    if free <= 0:
        want = f"fewer than model.max_position_embeddings = {model.section.max_position_embeddings}"
        raise UserError(Problem("the prompt is too long", f"{len(prompt_ids)} tokens", want, "the prompt"))
    check_seed(seed)
    banned = [i for i in banned_ids if i not in stop_ids]
    count = min(free, settings.max_tokens)

    def new_ids() -> Iterator[int]:  # a function of its own, so that the errors above do not wait for the first next()
        generator = torch.Generator().manual_seed(seed)
        cache = model.new_cache(1, len(prompt_ids) + count)
        ids = list(prompt_ids)  # first the prompt at once, then token by token: the cache holds what was before
        for _ in range(count):
            logits_V = _next_logits(model, ids, cache)
            if not logits_V.isfinite().all():
                raise TrainingStopped("the model cannot write: its logits are not finite numbers")
            logits_V[banned] = -torch.inf
            new = sample_token(logits_V, settings, greedy, generator)
            if new in stop_ids:
                return
            yield new
            ids = [new]
        if count < settings.max_tokens:
            room = model.section.max_position_embeddings
            say(f"the text stops where the context of {room:,} tokens ends: prompt {len(prompt_ids):,}, new {count:,}")

    return new_ids()


@torch.no_grad()
def _next_logits(model: LanguageModel, ids: list[int], cache: Any) -> Tensor:
    """Logits [V] behind the ids; a function, so that between two tokens the caller finds its own modes unchanged."""
    with eval_mode(model):
        ids_BT = torch.tensor([ids], device=model.device)
        return model(ids_BT, cache=cache, last_only=True)[0, -1]


def decode_stream(prompt_ids: list[int], new_ids: Iterable[int], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """Decode new ids as they arrive; the bytes of an unfinished character wait for the rest of it."""
    ids = list(prompt_ids)
    length = len(decode(ids))  # of the text that the caller has
    for new in new_ids:
        ids.append(new)
        text = decode(ids).rstrip("\ufffd")  # what stands for unfinished bytes
        if len(text) > length:
            yield text[length:]
            length = len(text)
    yield decode(ids)[length:]
