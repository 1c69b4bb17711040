"""Where the ticks of an axis stand, and what is written beside them: round numbers, no two of them alike."""

import math
from collections.abc import Sequence

SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
FINE_TO_COARSE = ((1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 5, 7), (1, 2, 5), (1,))  # ticks of a decade
MIN_LOG_TICKS = 3


def pick_linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` multiples of 1, 2 or 5 times a power of ten, from low to high."""
    span = high - low
    if not span > 1e-9 * max(abs(low), abs(high)):
        return [high]
    magnitude = 10.0 ** math.floor(math.log10(span / count))
    step = min((factor * magnitude for factor in (1, 2, 5, 10)), key=lambda step: abs(span / step - count))
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    decimals = max(0, 2 - math.floor(math.log10(step)))
    return [round(number * step, decimals) for number in numbers]


def pick_log_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """As many ticks between two positive numbers as a logarithmic axis can read, and never fewer than linear ones."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for factors in FINE_TO_COARSE:
        ticks = [float(f"{factor}e{decade}") for decade in decades for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= count + 3:
            break
    else:
        ticks = ticks[:: math.ceil(len(ticks) / count)]
    if len(ticks) >= MIN_LOG_TICKS:
        return ticks
    linear = [tick for tick in pick_linear_ticks(low, high, count) if tick > 0]
    return linear if len(linear) > len(ticks) else ticks


def format_ticks(values: Sequence[float]) -> list[str]:
    """The numbers of an axis, short and exact to 12 digits: 0.05, 3e-4, 5,050; thousands as 5k where one has 10k."""
    is_large = max((abs(value) for value in values), default=0.0) >= 10_000
    return [_format_tick(value, is_large=is_large) for value in values]


def _format_tick(value: float, *, is_large: bool) -> str:
    size = abs(value)
    if 0 < size < 0.001:
        return _format_tiny(value, 12)
    if is_large and 1000 <= size < 1e15:
        unit, suffix = next(pair for pair in SUFFIXES if pair[0] <= size)
        return f"{value / unit:.12g}{suffix}"
    return f"{value:,.12g}" if size < 1e15 else f"{value:g}"


def _format_tiny(value: float, digits: int) -> str:
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{float(mantissa):.{digits}g}e{int(exponent)}"


def format_number(value: float | None, digits: int = 4) -> str:
    """Any number in a text: so many significant digits, or all before the point; a dash where there is none."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 10 ** (digits - 1) or value == int(value):
        return f"{value:,.0f}"
    return _format_tiny(value, digits) if abs(value) < 0.001 else f"{value:.{digits}g}"


def format_short(value: float) -> str:
    """A count in three digits: 614k, 2.52M."""
    for unit, suffix in SUFFIXES:
        if abs(value) >= 0.9995 * unit:  # which three digits round up to it
            return f"{value / unit:.3g}{suffix}"
    return f"{value:g}"


def format_clock(seconds: float) -> str:
    """A duration as 3:12:07 or 12:07."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def drop_crowded(places: Sequence[float], labels: Sequence[str], character: float, keep: Sequence[float]) -> list[bool]:
    """Which of these labels are shown, so that none runs into another: those at the places of `keep` before others.

    Places are shares of the axis, and `character` is the share that one takes. Labels at the ends stay within the axis.
    """
    taken: list[tuple[float, float]] = []
    chosen = [False] * len(places)
    order = sorted(range(len(places)), key=lambda number: (places[number] not in keep, -places[number]))
    for number in order:
        width = character * len(labels[number])
        left = min(max(places[number] - width / 2, 0.0), 1 - width)
        space = (left - character, left + width + character)
        if all(space[1] <= other[0] or space[0] >= other[1] for other in taken):
            taken.append((left, left + width))
            chosen[number] = True
    return chosen
