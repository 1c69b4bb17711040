"""What a run's own numbers advise: one line each, '' if there is nothing to say."""

MIN_GAP_NATS, MIN_GAP_SHARE = (
    0.5,
    0.15,
)  # of a gap; held-out documents that no row repeats were up to 0.53 nats (11 %) harder for us


def memorisation_warning(train_loss: float, validation_loss: float, epochs: float) -> str:
    """One line with advice; '' if there is nothing to warn of. Losses in nats per token, a mean of some steps each.

    Within the first epoch a gap only means that the held-out documents are harder, or that a label is wrong: no row
    has been seen before. Four epochs cost next to nothing (Muennighoff et al. 2023), so their number alone is no fault.
    """
    gap = validation_loss - train_loss
    if not (epochs > 1 and gap > max(MIN_GAP_NATS, MIN_GAP_SHARE * validation_loss)):
        return ""
    return (
        f"WARNING: the model memorises its training rows: training loss {train_loss:.3f}, validation loss "
        f"{validation_loss:.3f} after {epochs:.1f} epochs; train on more text, for fewer steps, or a smaller model, "
        "and take the checkpoint of the lowest validation loss"
    )


SLOW_DATA_SHARE = 0.05  # of a step


def slow_data_warning(wait_share: float) -> str:
    """One line with advice where the steps wait for their rows, a mean of some of them; '' if they do not."""
    if wait_share <= SLOW_DATA_SHARE:
        return ""
    return (
        f"WARNING: {wait_share:.0%} of the step is spent waiting for data; prepare them ahead with `smoltrain prepare "
        "data`, or give each rank more CPU cores, a faster disk or network, or larger shards"
    )
