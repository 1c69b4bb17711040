"""The words of a grid: how values part, which keys may be axes, every combination, and names."""

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoltrain.checkpoint.identity import FREE, KEY_RULES
from smoltrain.config.load import load_config
from smoltrain.config.schema import PhaseSection
from smoltrain.errors import UserError
from smoltrain.tune.grid import (
    MAX_RUNS,
    Axis,
    GridPoint,
    describe_point,
    find_axis_fault,
    is_axis_word,
    list_points,
    make_axis,
    make_lr_axis,
    name_run,
    split_values,
)

MAIN = PhaseSection(name="main", steps=160, lr=2e-3, final_lr=2e-4, schedule="cosine")


def axis(key: str, *values: str) -> Axis:
    return Axis(key, values, tuple((f"{key}={value}",) for value in values))


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("adamw,muon", ["adamw", "muon"]),
        ("1e-3, 2e-3 ,4e-3", ["1e-3", "2e-3", "4e-3"]),
        ("[1,2],[3]", ["[1,2]", "[3]"]),
        ('{a: 1, b: 2},{"x,": "]"}', ["{a: 1, b: 2}", '{"x,": "]"}']),
        ("'/a,b'", ["'/a,b'"]),
        ('"a,b",c', ['"a,b"', "c"]),
        ("it's,here", ["it's", "here"]),
        ("[SEP,x", ["[SEP,x"]),
        ("a],b", ["a]", "b"]),
        ("1,,2", ["1", "", "2"]),
        ("", [""]),
    ],
)
def test_values_part_at_commas_outside_of_brackets_and_quotes(text: str, values: list[str]):
    assert split_values(text) == values
    assert is_axis_word(f"key={text}") == (len(values) > 1)


@given(st.lists(st.text(st.characters(exclude_characters=",[]{}\"'")), min_size=1))
def test_plain_values_come_back_as_they_were_joined(values: list[str]):
    assert split_values(",".join(values)) == [value.strip() for value in values]


def test_a_word_without_a_key_is_no_axis():
    assert not is_axis_word("a,b")


# --- which keys


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("phases.main.lr", None),
        ("optimizer.kind", None),
        ("batch.accumulation", None),
        ("init.from", None),
        ("no.such.key", None),
        ("phases.continuation.lr", "phase main alone is trained"),
        ("phases.main.tokens", "--steps N"),
        ("phases.main.name", "--steps N"),
        ("run.seed", "--seeds N"),
        ("run.folder", "where runs live"),
        ("tokenizer", "could not be compared"),
        ("data.sources.a.path", "could not be compared"),
        ("evaluate.rows", "could not be compared"),
        ("packing.document_mask", "could not be compared"),
        ("batch.sequence_length", "could not be compared"),
        ("checkpoint.every", "nothing that is learned"),
    ],
)
def test_which_keys_may_be_axes(key: str, reason: str | None):
    found = find_axis_fault(key, "main")
    assert (found is None) if reason is None else (found and reason in found)


def test_no_key_that_teaches_nothing_is_an_axis():
    free = [key for key, rule in KEY_RULES.items() if rule == FREE and not key.startswith("init.")]
    assert [key for key in free if find_axis_fault(key, "main") is None] == []
    with pytest.raises(UserError, match=r"run.seed cannot be an axis: saw 2 values, want one value .--seeds N trains"):
        make_axis("run.seed", "1,2", MAIN)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1e-3,,2e-3", "a value of optimizer.eps is empty: saw 1e-3,,2e-3"),
        ("1e-3,", "a value of optimizer.eps is empty: saw 1e-3,"),
        (",", "a value of optimizer.eps is empty: saw ,"),
        ("1,2,1", "optimizer.eps has a value twice: saw 1, want each value once"),
    ],
)
def test_values_that_are_empty_or_stand_twice_are_refused(text: str, message: str):
    with pytest.raises(UserError) as refused:
        make_axis("optimizer.eps", text, MAIN)
    assert str(refused.value).startswith(message)


# --- the learning rate


def test_the_final_rate_moves_with_the_peak():
    rates = make_lr_axis("1e-3,0.002,4e-3", MAIN)
    assert rates.key == "phases.main.lr"
    assert rates.words == (
        ("phases.main.lr=1e-3", "phases.main.final_lr=0.0001"),
        ("phases.main.lr=0.002", "phases.main.final_lr=0.0002"),
        ("phases.main.lr=4e-3", "phases.main.final_lr=0.0004"),
    )


def test_without_a_final_rate_there_is_nothing_to_move():
    constant = PhaseSection(name="main", steps=160, lr=2e-3)
    assert make_lr_axis("1e-3,2e-3", constant).words == (("phases.main.lr=1e-3",), ("phases.main.lr=2e-3",))


@settings(max_examples=25)
@given(st.floats(1e-8, 1e2))
def test_the_schedule_keeps_its_shape_at_any_peak(peak: float):
    (words,) = make_lr_axis(repr(peak), MAIN).words
    config = load_config("quickstart", list(words))
    phase = config.phases[0]
    assert phase.lr == peak
    assert phase.final_lr == pytest.approx(peak * MAIN.final_lr / 2e-3, rel=1e-5)


@pytest.mark.parametrize("text", ["fast", "nan", "inf"])
def test_a_rate_that_is_none_is_left_to_those_who_read_recipes(text: str):
    assert make_lr_axis(text, MAIN).words == ((f"phases.main.lr={text}",),)


# --- the product


def test_points_are_all_combinations_the_last_axis_first_to_change():
    points = list_points([axis("optimizer.kind", "adamw", "muon"), axis("phases.main.lr", "1e-3", "2e-3")], 3)
    assert [describe_point(point) for point in points] == [
        "kind adamw, lr 1e-3",
        "kind adamw, lr 2e-3",
        "kind muon, lr 1e-3",
        "kind muon, lr 2e-3",
    ]
    assert points[1].words == ("optimizer.kind=adamw", "phases.main.lr=2e-3")


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4).filter(lambda sizes: max(sizes) > 1))
def test_there_are_as_many_points_as_products_and_no_two_are_alike(sizes: list[int]):
    axes = [axis(f"model.key{n}", *map(str, range(size))) for n, size in enumerate(sizes)]
    points = list_points(axes, 1)
    expected = list(itertools.product(*(list(a.values) for a in axes)))
    assert [tuple(value for _, value in point.settings) for point in points] == expected


def test_equal_last_parts_of_keys_stand_in_full():
    [first, *_] = list_points([axis("optimizer.eps", "1"), axis("model.eps", "2"), axis("phases.main.lr", "3", "4")], 1)
    assert describe_point(first) == "optimizer.eps 1, model.eps 2, lr 3"


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ([], "there is nothing to compare: saw no key with several values, want --lr V1,V2"),
        ([axis("a.b", "1")], "there is nothing to compare: saw no key with several values"),
        ([axis("a.b", "1", "2"), axis("a.b", "3", "4")], "a key is an axis twice: saw a.b"),
        (
            [axis("a.b", *map(str, range(100))), axis("c.d", *map(str, range(11)))],
            "the grid has too many runs: saw 100",
        ),
    ],
)
def test_grids_that_nobody_means(axes: list[Axis], message: str):
    with pytest.raises(UserError) as refused:
        list_points(axes, 1)
    assert str(refused.value).startswith(message)


def test_seeds_count_too():
    axes = [axis("a.b", *map(str, range(100)))]
    assert len(list_points(axes, MAX_RUNS // 100)) == 100
    with pytest.raises(UserError, match=r"100 x 11 seeds = 1,100, want at most 1,000"):
        list_points(axes, 11)


# --- names


@settings(max_examples=30)
@given(st.text(max_size=120), st.integers(0, 2**63 - 1))
def test_a_name_is_one_that_a_run_may_have(value: str, seed: int):
    point = GridPoint((("data.key", value),), ())
    name = name_run(point, seed, "content")
    assert re.fullmatch(r"\w[\w.-]*", name)
    assert len(name.encode()) <= 200


def test_a_name_is_of_its_content():
    point = GridPoint((("phases.main.lr", "2e-3"),), ())
    name = name_run(point, 7, "content")
    assert name.startswith("lr-2e-3_seed-7_")
    assert name_run(point, 7, "content") == name != name_run(point, 7, "other content")
