"""How likely a model holds given tokens: windows of them, scored in padded batches.

Legend: B windows of a batch, T tokens of the longest, K scored tokens of one, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from smoltrain.errors import TrainingStopped
from smoltrain.model.interface import LanguageModel, eval_mode

MAX_BATCH_TOKENS = 2**14  # of all windows, padded
MAX_BATCH_LOGITS = 2**26  # of all windows, padded: 256 MiB in fp32; one window may have more


class Window(NamedTuple):
    """Consecutive ids: the model reads all but the last, and predicts all but the first."""

    ids: Sequence[int]
    num_scored: int  # of the predictions, the last ones: those before are context


class Score(NamedTuple):
    """What a model holds of the scored tokens of a window."""

    log_probability: float  # of all of them together, nats
    is_greedy: bool  # whether each was the likeliest token


def make_windows(pieces: Iterable[Sequence[int]], prefix_id: int, context: int, stride: int) -> Iterator[Window]:
    """Windows over the tokens of one text, in which each token is scored once, behind `prefix_id`.

    The model reads `context` tokens at most; the next window begins `stride` tokens later, so that a token has at least
    `context - stride + 1` tokens before it, as far as there are any. This is the strided loop of transformers' page on
    perplexity. `pieces` are the text's tokens in order; no more than one of them and a window is held in memory.
    """
    assert 0 < stride <= context
    ids = [prefix_id]  # from the beginning of the next window on
    num_known = 1  # of these, which an earlier window has scored
    for piece in pieces:
        ids.extend(piece)
        begin = 0
        while len(ids) - begin > context:
            yield Window(ids[begin : begin + context + 1], context + 1 - num_known)
            begin += stride
            num_known = context + 1 - stride
        del ids[:begin]
    if len(ids) > num_known:
        yield Window(ids, len(ids) - num_known)


def batch_windows(windows: Iterable[Window], vocab_size: int) -> Iterator[list[Window]]:
    """The windows in their order, as many at once as the limits above allow; at least one."""
    batch: list[Window] = []
    longest = 0
    for window in windows:
        longest = max(longest, len(window.ids) - 1)
        num_tokens = longest * (len(batch) + 1)
        if batch and (num_tokens > MAX_BATCH_TOKENS or num_tokens * vocab_size > MAX_BATCH_LOGITS):
            yield batch
            batch = []
            longest = len(window.ids) - 1
        batch.append(window)
    if batch:
        yield batch


def plan_batches(windows: Sequence[Window], vocab_size: int) -> list[list[int]]:
    """Places of the windows, the longest first, in batches: those of about one length lie together."""
    places = sorted(range(len(windows)), key=lambda place: -len(windows[place].ids))
    batches: list[list[int]] = []
    first = 0
    for batch in batch_windows((windows[place] for place in places), vocab_size):
        batches.append(places[first : first + len(batch)])
        first += len(batch)
    return batches


@torch.no_grad()
def score_batch(model: LanguageModel, windows: Sequence[Window]) -> list[Score]:
    """The score of each window, in one forward pass. Errors: TrainingStopped for logits that are not finite."""
    inputs = [torch.tensor(window.ids[:-1]) for window in windows]
    ids_BT = pad_sequence(inputs, batch_first=True)  # with id 0 behind, which a causal model does not see before
    with eval_mode(model):
        logits_BTV = model(ids_BT.to(model.device))
    return [_score_window(logits_TV, window) for logits_TV, window in zip(logits_BTV, windows, strict=True)]


def _score_window(logits_TV: torch.Tensor, window: Window) -> Score:
    last = len(window.ids) - 1
    logits_KV = logits_TV[last - window.num_scored : last].float()
    ids_K = torch.tensor(window.ids[-window.num_scored :], device=logits_KV.device)
    losses_K = F.cross_entropy(logits_KV, ids_K, reduction="none")
    loss = float(losses_K.cpu().double().sum())
    if not torch.isfinite(logits_KV).all():
        raise TrainingStopped("the model cannot be judged: its logits are not finite numbers")
    return Score(-loss, bool((logits_KV.argmax(-1) == ids_K).all()))
