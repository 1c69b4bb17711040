"""Warnings that a run's own numbers give: one line of advice each, None if there is nothing to warn of."""

from collections.abc import Iterable, Mapping
from typing import Any

from smoltrain.evaluation.memorisation import HELD_OUT, KIND_NAMES, RECALLED, WRITTEN, Memorisation

# A gap between training and validation loss that is no memorisation: held-out documents that no row repeats were up to
# 0.53 nats (11 %) harder for us. A larger one than both, nats per token and share of the validation loss, is told.
MIN_GAP_NATS = 0.5
MIN_GAP_SHARE = 0.15
# A copied share beyond that of held-out text, which differs by chance: a share of 32 texts, whose n-grams are copied or
# not together, is known to about a tenth.
MIN_COPIED_BEYOND = 0.1
SLOW_DATA_SHARE = 0.05  # of a step
SLOW_NETWORK_SHARE = 0.3  # of a step: a network that took no time would make it 1.4 times as fast


def memorisation_warning(train_loss: float, validation_loss: float, epochs: float) -> str | None:
    """One line with advice where the model memorises. Losses in nats per token, a mean of some steps each.

    Within the first epoch a gap only means that the held-out documents are harder, or that a label is wrong: no row
    has been seen before. Four epochs cost next to nothing (Muennighoff et al. 2023), so their number alone is no fault.
    """
    gap = validation_loss - train_loss
    is_large = gap > max(MIN_GAP_NATS, MIN_GAP_SHARE * validation_loss)  # false where a loss is not a number
    if epochs <= 1 or not is_large:
        return None
    return (
        f"WARNING: the model memorises its training rows: training loss {train_loss:.3f}, validation loss "
        f"{validation_loss:.3f} after {epochs:.1f} epochs; train on more text, for fewer steps, or a smaller model, "
        "and take the checkpoint of the lowest validation loss"
    )


def copying_warning(found: Memorisation) -> str | None:
    """One line with advice where the model copies its training text, word for word, more than held-out text does.

    Unlike the gap of the losses this also tells within the first epoch: of text that the data repeat.
    """
    worst: tuple[float, str] | None = None
    for kind in (WRITTEN, RECALLED):
        for own, held_out in zip(found.counts[kind], found.counts[HELD_OUT], strict=True):
            if own.share is None or held_out.share is None or own.share - held_out.share <= MIN_COPIED_BEYOND:
                continue
            said = (
                f"{own.share:.0%} of the {own.length}-grams that it writes {KIND_NAMES[kind]} stand there, of held-out "
                f"text {held_out.share:.0%}"
            )
            worst = max(worst or (0.0, ""), (own.share - held_out.share, said))
    if worst is None:
        return None
    return (
        f"WARNING: the model copies its training text: {worst[1]}; train on more text, for fewer steps, or a smaller "
        "model, and look for text that the data repeat"
    )


def slow_data_warning(wait_share: float) -> str | None:
    """One line with advice where steps wait for their rows. `wait_share` of a step's time, a mean of some steps."""
    if wait_share <= SLOW_DATA_SHARE:
        return None
    return (
        f"WARNING: {wait_share:.0%} of the step is spent waiting for data; prepare them ahead with `smoltrain prepare "
        "data`, or give each rank more CPU cores, a faster disk or network, or larger shards"
    )


def communication_share(steps: Iterable[Mapping[str, Any]]) -> float:
    """Of the time of these steps, that in which no rank waited for another but all for the network; 0 for one rank.

    A step's line has the seconds of the step before, so that the share is that of many steps, not of one.
    """
    told = [metrics for metrics in steps if "speed/communication_s" in metrics]
    if not told:
        return 0.0
    waited_s = sum(metrics["speed/communication_s"] for metrics in told)
    return waited_s / sum(metrics["speed/step_s"] for metrics in told)


def slow_network_warning(share: float, sent_mb: float, *, each_micro_batch: bool, num_machines: int) -> str | None:
    """One line with advice where steps wait for the network, by `communication_share`.

    `sent_mb`: by a rank in a step. `each_micro_batch`: whether the recipe asks for gradients to be reduced so often.
    """
    if share <= SLOW_NETWORK_SHARE:
        return None
    way = "try engine.reduce_gradients=step, " if each_micro_batch else ""
    link = ", or a faster link (`smoltrain check-hosts` measures it)" if num_machines > 1 else ""
    return (
        f"WARNING: {share:.0%} of the step is spent in communication between ranks, of which each sends "
        f"{sent_mb:,.1f} MB; {way}more rows per step and rank (batch.rows_per_step, batch.accumulation), fewer "
        f"ranks{link}"
    )


def lost_steps_warning(saved_step: int, reached_step: int) -> str:
    """One line with advice where a start was killed behind its last checkpoint, as by a time limit that it overran.

    A job that is queued again, and is killed each time before its first checkpoint, would go on like that for ever.
    """
    saved = f"nothing later than step {saved_step:,} was saved" if saved_step else "nothing was saved"
    return (
        f"WARNING: the start before was killed at step {reached_step:,}, and {saved}: its steps are done again; a "
        "smaller checkpoint.every, or a signal some minutes before a time limit, loses fewer"
    )
