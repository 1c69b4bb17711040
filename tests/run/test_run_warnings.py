"""The warning comes when a text was memorised, and not when held-out documents are just harder."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoltrain.evaluation.memorisation import Memorisation, NgramCount
from smoltrain.run.run_warnings import (
    communication_share,
    copying_warning,
    memorisation_warning,
    slow_data_warning,
    slow_network_warning,
)

LOSSES = st.floats(0, 20)


@pytest.mark.parametrize(
    ("train_loss", "validation_loss", "epochs"), [(0.064, 6.5, 35.0), (1.2, 2.0, 8.0), (3.0, 3.8, 12.0)]
)
def test_a_memorised_text_is_told(train_loss: float, validation_loss: float, epochs: float):
    line = memorisation_warning(train_loss, validation_loss, epochs)
    assert line
    assert line.startswith("WARNING: the model memorises its training rows: ")
    assert f"training loss {train_loss:.3f}, validation loss {validation_loss:.3f} after {epochs:.1f} epochs" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("train_loss", "validation_loss", "epochs"),
    [
        (4.14, 4.67, 0.85),  # docs/results/shakespeare-80m.md: held-out plays are harder
        (4.14, 4.67, 1.2),  # and stay so in the second epoch
        (0.1, 9.0, 1.0),  # rows seen for the first time: a wrong label, no memory
        (3.2, 3.3, 40.0),
        (3.3, 3.2, 40.0),
        (math.nan, 3.0, 9.0),
        (1.0, math.nan, 9.0),
        (1.0, math.inf, 9.0),  # another fault
    ],
)
def test_other_runs_are_left_alone(train_loss: float, validation_loss: float, epochs: float):
    assert memorisation_warning(train_loss, validation_loss, epochs) is None


@given(LOSSES, LOSSES, st.floats(0, 100), st.floats(0, 5), st.floats(0, 100))
def test_a_worse_case_is_told_too(train_loss: float, validation_loss: float, epochs: float, less: float, more: float):
    if memorisation_warning(train_loss, validation_loss, epochs):
        assert memorisation_warning(train_loss - less, validation_loss, epochs + more)


def counts_of(shares: dict[str, tuple[float, float]]) -> Memorisation:
    """Of 100 n-grams of each length and kind."""
    lengths = (13, 50)
    kinds = {
        kind: tuple(NgramCount(n, 100, int(100 * x)) for n, x in zip(lengths, own, strict=True))
        for kind, own in shares.items()
    }
    return Memorisation(kinds)


@pytest.mark.parametrize(
    ("written", "recalled", "held_out", "told"),
    [
        ((0.0, 0.0), (0.99, 0.97), (0.0, 0.0), "99% of the 13-grams that it writes after training prompts"),
        ((0.3, 0.0), (0.2, 0.0), (0.1, 0.0), "30% of the 13-grams that it writes after held-out prompts"),
        ((0.6, 0.5), (0.6, 0.5), (0.5, 0.3), "50% of the 50-grams that it writes after training prompts"),
        ((0.6, 0.5), (0.6, 0.5), (0.6, 0.5), None),  # a corpus of boilerplate, held-out text too
        ((0.1, 0.1), (0.1, 0.1), (0.0, 0.0), None),
    ],
)
def test_copies_are_told_beyond_what_held_out_text_repeats(
    written: tuple[float, float], recalled: tuple[float, float], held_out: tuple[float, float], told: str | None
):
    found = counts_of({"share": written, "recalled_share": recalled, "held_out_share": held_out})
    line = copying_warning(found)
    if told is None:
        assert line is None
    else:
        assert line
        assert line.startswith(f"WARNING: the model copies its training text: {told} stand there, of held-out text ")


def test_texts_too_short_for_n_grams_give_no_warning():
    nothing = (NgramCount(13, 0, 0), NgramCount(50, 0, 0))
    assert copying_warning(Memorisation(dict.fromkeys(("share", "recalled_share", "held_out_share"), nothing))) is None


def test_waiting_for_data_is_told_past_a_twentieth():
    assert slow_data_warning(0.05) is None
    assert slow_data_warning(0.0) is None
    line = slow_data_warning(0.051)
    assert line
    assert line.startswith("WARNING: 5% of the step is spent waiting for data; prepare them ahead")


def test_waiting_for_the_network_is_told_past_three_tenths_with_what_to_change():
    steps = [{"speed/step_s": 9.0}, *[{"speed/step_s": 1.0, "speed/communication_s": told} for told in (0.2, 0.6)]]
    assert communication_share(steps) == pytest.approx(0.4), "of the steps that tell it: the first of a start does not"
    assert communication_share([{"speed/step_s": 1.0}]) == 0, "one rank"
    assert slow_network_warning(0.3, 12.6, each_micro_batch=True, num_machines=2) is None
    line = slow_network_warning(0.4, 12.6, each_micro_batch=True, num_machines=2)
    assert line == (
        "WARNING: 40% of the step is spent in communication between ranks, of which each sends 12.6 MB; try "
        "engine.reduce_gradients=step, more rows per step and rank (batch.rows_per_step, batch.accumulation), fewer "
        "ranks, or a faster link (`smoltrain check-hosts` measures it)"
    )
    here = slow_network_warning(0.4, 12.6, each_micro_batch=False, num_machines=1)
    assert here
    assert "reduce_gradients" not in here
    assert "check-hosts" not in here
