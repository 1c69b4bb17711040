"""Shapes: the number of parameters is met, and the published models come out as they are."""

import hypothesis
import hypothesis.strategies as st
import pytest

from smoltrain.config.schema import ModelSection
from smoltrain.model.build import build_model, count_parameters
from smoltrain.new_recipe import shape as shapes
from smoltrain.new_recipe.shape import (
    MAX_PARAMETERS,
    MIN_PARAMETERS,
    PUBLISHED_ASPECTS,
    DecoderShape,
    choose_decoder_shape,
    largest_table,
    published_aspect,
)

SMOLLM2_135M = DecoderShape(49152, 576, 30, 9, 3, 1536, tie_word_embeddings=True)
SMOLLM2_360M = DecoderShape(49152, 960, 32, 15, 5, 2560, tie_word_embeddings=True)
SIZES = st.floats(0, 1).map(lambda x: int(MIN_PARAMETERS * (MAX_PARAMETERS / MIN_PARAMETERS) ** x))


def count_on_meta(shape: DecoderShape) -> int:
    values = {name: getattr(shape, name) for name in DecoderShape.__dataclass_fields__}
    return count_parameters(build_model(ModelSection(**values, max_position_embeddings=64), device="meta"))


def test_smollm2_comes_out_as_it_is():
    assert choose_decoder_shape(135_000_000, 49152) == SMOLLM2_135M
    assert choose_decoder_shape(360_000_000, 49152) == SMOLLM2_360M
    assert (SMOLLM2_135M.num_parameters, SMOLLM2_360M.num_parameters) == (134_515_008, 361_821_120)


@pytest.mark.parametrize(
    ("params", "vocab_size"),
    [(1_000_000, 257), (2_000_000, 2240), (20_000_000, 8000), (1_000_000_000, 49152), (7_000_000_000, 49152)],
)
def test_the_count_is_the_models_own(params: int, vocab_size: int):
    shape = choose_decoder_shape(params, vocab_size)
    assert shape.num_parameters == count_on_meta(shape)
    assert abs(shape.num_parameters / params - 1) <= shapes.TOLERANCE


@hypothesis.given(SIZES, st.integers(257, 49152))
@hypothesis.example(1_000_000, 358)  # the nearest number of parameters is that of a shape too wide by a little
@hypothesis.settings(max_examples=30)
def test_any_size_has_a_shape_near_it(params: int, wanted_ids: int):
    vocab_size = min(wanted_ids, largest_table(params))
    shape = choose_decoder_shape(params, vocab_size)
    assert abs(shape.num_parameters / params - 1) <= (0.03 if params >= 2_000_000 else 0.06)
    assert shape.hidden_size % shape.num_attention_heads == 0
    assert shape.hidden_size // shape.num_attention_heads in (64, 128)
    assert shape.num_attention_heads % shape.num_key_value_heads == 0
    assert shape.intermediate_size % 64 == 0
    assert 2 <= shape.intermediate_size / shape.hidden_size <= 4
    aspect = shape.hidden_size / shape.num_hidden_layers / published_aspect(params)
    assert 1 / 3 <= aspect <= 3


def test_proportions_are_interpolated_between_published_ones():
    for size, aspect in PUBLISHED_ASPECTS:
        assert published_aspect(size) == pytest.approx(aspect)
    assert published_aspect(MIN_PARAMETERS) == pytest.approx(576 / 30)
    assert published_aspect(MAX_PARAMETERS) == pytest.approx(3072 / 28)
    assert 30 < published_aspect(700_000_000) < 128


def test_the_table_takes_the_share_of_smollm2s_and_grows_with_the_model():
    assert largest_table(134_515_008) == pytest.approx(49_152, rel=0.01)
    sizes = [largest_table(10**power) for power in range(6, 11)]
    assert sizes == sorted(sizes)


def test_heads_and_ties_follow_the_size():
    small = choose_decoder_shape(1_000_000_000, 49152)
    large = choose_decoder_shape(7_000_000_000, 49152)
    assert small.hidden_size // small.num_attention_heads == 64
    assert small.tie_word_embeddings
    assert large.hidden_size // large.num_attention_heads == 128
    assert not large.tie_word_embeddings
