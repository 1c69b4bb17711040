"""The least time of a step, against the numbers of a data sheet and sums by hand."""

import pytest

from benchmarks.gpu_task import RECIPE
from benchmarks.roofline import ATTENTION, ELEMENTWISE, PRODUCTS, UPDATE, RooflinePart, list_roofline_parts, sum_by_kind
from smoltrain.config.load import load_config
from smoltrain.config.schema import ModelSection
from smoltrain.model.build import build_model

FLOPS, BYTES_PER_S = 790e12, 4.3e12  # of an H200, as measured


def smollm2() -> ModelSection:
    section = load_config(RECIPE, []).model
    assert isinstance(section, ModelSection)
    return section


def test_a_part_is_bound_by_the_slower_of_the_two() -> None:
    assert RooflinePart(PRODUCTS, 10.0, 1.0).seconds(flops=5.0, bytes_per_s=1.0) == 2.0
    assert RooflinePart(PRODUCTS, 10.0, 8.0).seconds(flops=5.0, bytes_per_s=2.0) == 4.0


def test_products_and_attention_are_those_that_mfu_counts() -> None:
    section = smollm2()
    parts = list_roofline_parts(section, 16 * 2048, 1, 2048)
    n = 16 * 2048
    model = build_model(section, device="meta")
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    products = sum(part.operations for part in parts if part.kind == PRODUCTS)
    assert products == 6 * matrices * n  # the tied table is the head's product
    attention = sum(part.operations for part in parts if part.kind == ATTENTION)
    whole = 12 * section.num_hidden_layers * section.hidden_size * 2048 * n  # as MFU counts: all of T x T, 3 passes
    assert attention == pytest.approx(whole / 2 * 3.5 / 3)


def test_a_micro_batch_of_smollm2_on_an_h200() -> None:
    seconds = sum_by_kind(list_roofline_parts(smollm2(), 16 * 2048, 1, 2048), FLOPS, BYTES_PER_S)
    assert list(seconds) == [PRODUCTS, ATTENTION, ELEMENTWISE, UPDATE]
    assert sum(seconds.values()) == pytest.approx(0.062, abs=0.004)  # 528 thousand tokens/s


def test_micro_batches_share_one_update_and_each_adds_its_gradients() -> None:
    one, four = (list_roofline_parts(smollm2(), 2048, count, 2048) for count in (1, 4))
    assert [4 * part.operations for part in one] == [part.operations for part in four]
    num_parameters = sum(p.numel() for p in build_model(smollm2(), device="meta").parameters() if p.ndim == 2)
    assert one[-1].num_bytes == 40 * num_parameters
    assert four[-1].num_bytes == 70 * num_parameters
