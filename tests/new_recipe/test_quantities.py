"""Counts as they are typed and shown."""

import pytest

from smoltrain.errors import UserError
from smoltrain.new_recipe.quantities import (
    format_ratio,
    parse_option_count,
    round_down_to_power_of_two,
    round_to_digits,
)


@pytest.mark.parametrize(
    ("text", "number"),
    [("20M", 20_000_000), ("1.5b", 1_500_000_000), ("400_000", 400_000), ("2e6", 2_000_000), (" 5K ", 5000)],
)
def test_a_count_is_read_as_people_write_it(text: str, number: int):
    assert parse_option_count(text, "--params", 1, 10**12) == number


@pytest.mark.parametrize("text", ["20X", "0", "", "-5M", "M", "1,000", "10T", "nan", "1e99", "2 0M", "0x10"])
def test_any_other_count_is_refused_by_the_name_of_its_option(text: str):
    with pytest.raises(UserError) as error:
        parse_option_count(text, "--params", 1000, 10**9)
    assert str(error.value).startswith("--params is not valid: saw ")
    assert "want 1K to 1B, as in 1K or 1_000; change --params" in str(error.value)


def test_numbers_are_shown_in_three_digits():
    assert [format_ratio(n) for n in (0.05171, 3.4823, 20, 2006.4)] == ["0.0517", "3.48", "20", "2,006"]


def test_numbers_are_rounded():
    assert [round_down_to_power_of_two(n) for n in (1, 1.9, 2, 31.99, 32, 1000)] == [1, 1, 2, 16, 32, 512]
    assert round_to_digits(0.0023456, 2) == 0.0023
