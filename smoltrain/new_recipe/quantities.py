"""Counts as they are typed and shown: 20M, 1.5B, 400_000."""

import re

from smoltrain.config.schema import TOKEN_UNITS
from smoltrain.errors import Problem, UserError, format_value
from smoltrain.estimate.horizon import format_count

COUNT = re.compile(r"(\d[\d_]*(?:\.\d+)?(?:e\d{1,2})?)([KMBT]?)", re.IGNORECASE)


def parse_option_count(text: str, option: str, least: int, most: int) -> int:
    """The whole number that an option spells. Errors: UserError unless it is one from `least` to `most`."""
    match = COUNT.fullmatch(text.strip())
    number = float(match[1].replace("_", "")) * TOKEN_UNITS[match[2].upper()] if match else 0.0
    if not least <= number <= most:
        want = f"{format_count(least)} to {format_count(most)}, as in {format_count(least)} or {least:_}"
        raise UserError(Problem(f"{option} is not valid", format_value(text), want, option))
    return round(number)


def round_down_to_power_of_two(number: float) -> int:
    """The largest power of two that is at most the number, which is at least 1."""
    return 1 << (int(number).bit_length() - 1)


def round_to_digits(number: float, digits: int) -> float:
    """The number with so many significant digits."""
    return float(f"{number:.{digits}g}")


def format_ratio(number: float) -> str:
    """In three digits, or all of those before the point: 0.0517, 3.48, 2,006."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
