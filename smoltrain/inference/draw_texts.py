"""Many texts at once out of a model's own distribution, for numbers that are taken of what it writes.

Legend: B texts, P tokens of a prompt, V vocabulary.
"""

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch

from smoltrain.errors import TrainingStopped
from smoltrain.model.interface import LanguageModel, eval_mode


@torch.no_grad()
def draw_texts(
    model: LanguageModel, prompts_BP: np.ndarray, num_tokens: int, *, stop_ids: Collection[int],
    banned_ids: Sequence[int] = (), seed: int = 0, mark: Callable[[], None] = lambda: None,
) -> list[np.ndarray]:  # fmt: skip
    """The new ids behind each prompt, up to its first of `stop_ids`: drawn at temperature 1 from all tokens.

    There are always `num_tokens` passes through the model, so that ranks that share its weights stay together; `mark`
    is called before each. Neither torch's random state nor the model's mode changes.
    Errors: TrainingStopped where the model's logits are no numbers.
    """
    banned = [i for i in banned_ids if i not in stop_ids]
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    with eval_mode(model):
        cache = model.new_cache(len(prompts_BP), prompts_BP.shape[1] + num_tokens)
        ids = torch.from_numpy(prompts_BP.astype(np.int64)).to(model.device)
        for _ in range(num_tokens):
            mark()
            logits_BV = model(ids, cache=cache, last_only=True)[:, -1].cpu().double()
            if not logits_BV.isfinite().all():
                raise TrainingStopped("the model cannot write: its logits are not finite numbers")
            logits_BV[:, banned] = -torch.inf
            new_B = torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)
            drawn.append(new_B[:, 0].numpy())
            ids = new_B.to(model.device)
    return [_cut_at_stop(text, stop_ids) for text in np.stack(drawn, axis=1)]


def _cut_at_stop(ids: np.ndarray, stop_ids: Collection[int]) -> np.ndarray:
    stops = np.flatnonzero(np.isin(ids, list(stop_ids)))
    return ids[: stops[0]] if len(stops) else ids
