"""What a profile says: the table adds up, and advice comes only with a number that is large."""

from dataclasses import replace
from typing import Any

import pytest

from smoltrain.config.load import load_config
from smoltrain.profiling.kernel_times import KernelRun
from smoltrain.profiling.report import (
    PART_LABELS,
    Profile,
    build_operator_table,
    build_step_table,
    describe_measurement,
    write_profile_advice,
)
from smoltrain.profiling.trace import HOST_GAPS, RECOMPUTED, StepParts
from smoltrain.training.step_recorder import OTHER_RANKS

CONFIG = load_config("quickstart", ["batch.micro_batch=4", "engine.gradient_checkpointing=full"])
LARGE = [KernelRun("aten::mm", 0.0, 0.001)]


def profile(seconds: dict[str, float], **changes: Any) -> Profile:
    """Two steps of a second each; what `seconds` leaves is backward."""
    parts = {"backward": 2.0 - sum(seconds.values()), **seconds}
    base = Profile(
        StepParts(parts, 2.0, LARGE, uses_gpu=False), 2, 0.8, 1.5, 2, CONFIG, is_compiled=False, reduces_once=True,
        least_recompute="full",
    )  # fmt: skip
    return replace(base, **changes)


def cells(table: Any) -> list[tuple[str, ...]]:
    return list(zip(*(column.cells for column in table.columns), strict=True))


def test_the_table_adds_up() -> None:
    rows = cells(build_step_table(profile({"attention": 0.5, "data": 0.2, HOST_GAPS: 0.1, "a new part": 0.05})))
    assert rows[0] == (PART_LABELS["data"], "100.00", "10.0%")
    assert [label for label, _, _ in rows[1:]] == [
        "forward: attention",
        "backward",
        "host gaps: Python",
        "a new part",
        "in all",
    ]
    assert sum(float(ms) for _, ms, _ in rows[:-1]) == float(rows[-1][1]) == 1000.0
    compiled = cells(build_step_table(profile({"forward": 0.5}, is_compiled=True)))
    assert compiled[0][0] == "forward: compiled blocks and all else"


def test_operators_and_what_measuring_cost() -> None:
    assert cells(build_operator_table(profile({}))) == [("aten::mm", "0.5", "0.50", "0.1%")]
    told = describe_measurement(profile({}))
    assert told == (
        "2 steps of rank 0 of 2: 1000.0 ms each under the profiler, 800.0 ms without it (+25%); memory at its peak "
        "1.50 GiB a rank"
    )


@pytest.mark.parametrize(
    ("seconds", "changes", "advice"),
    [
        ({"data": 0.2}, {}, "10% of a step waits for rows"),
        ({OTHER_RANKS: 0.2}, {}, "10% of a step waits until every rank has rows"),
        ({"reduction": 0.4}, {}, "20% of a step reduces gradients, waiting for other ranks included: a larger batch"),
        ({"reduction": 0.4}, {"reduces_once": False}, "engine.reduce_gradients=step does it once a step"),
        ({RECOMPUTED: 0.4}, {"least_recompute": "none"}, "engine.gradient_checkpointing=none is estimated to fit here"),
        ({HOST_GAPS: 0.4}, {}, "20% of a step Python runs between two operators: engine.compile=on"),
        ({HOST_GAPS: 0.4}, {"is_compiled": True}, "two operators: a batch.micro_batch above 4"),
        ({"update": 0.6}, {}, "30% of a step is the update"),
    ],
)  # fmt: skip
def test_advice_names_the_number_and_the_key(seconds: dict[str, float], changes: dict[str, Any], advice: str) -> None:
    [line] = write_profile_advice(profile(seconds, **changes))
    assert advice in line


def test_many_small_operators() -> None:
    small = [KernelRun("aten::add", 0.0, 10e-6) for _ in range(40_000)]
    [line] = write_profile_advice(profile({}, parts=StepParts({"backward": 2.0}, 2.0, small, uses_gpu=False)))
    told = "20,000 operators of a step take less than 20 us each, 20% of its time together: engine.compile=on"
    assert line.startswith(told)


def test_nothing_is_advised_where_nothing_is_large() -> None:
    quiet = {"data": 0.05, "reduction": 0.1, HOST_GAPS: 0.2, "update": 0.3, RECOMPUTED: 0.4}
    assert list(write_profile_advice(profile(quiet))) == [], "full recomputation is the least that fits"
