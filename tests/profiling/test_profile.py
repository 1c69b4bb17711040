"""smoltrain profile: real steps, whose parts add up to them."""

import sys
from collections import Counter
from pathlib import Path

import pytest

from smoltrain.errors import UserError
from smoltrain.kernels.loss import RANGE_PREFIX
from smoltrain.profiling.profile import find_profiled_recipe, profile_recipe
from smoltrain.profiling.report import PART_LABELS
from smoltrain.profiling.trace import find_step_parts, read_trace
from tests import preloaded, tiny


@pytest.mark.slow
def test_the_parts_of_two_ranks_steps_add_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "executable", str(preloaded.programs() / "python"))
    monkeypatch.chdir(tmp_path)
    words = tiny.words(tmp_path)
    profile = profile_recipe("quickstart", words, steps=3, ranks=2, trace=None)
    told = capsys.readouterr().out
    print(told)
    seconds = profile.parts.seconds
    assert sum(seconds.values()) == pytest.approx(profile.parts.wall_s, rel=1e-9)
    assert set(seconds) == {*PART_LABELS} - {"gradients"}, "each part was there, and no other"
    assert min(seconds.values()) > 0
    # The plain steps are not those that were recorded, and a profiler slows down what it looks at.
    assert 0.5 < profile.parts.wall_s / 3 / profile.plain_step_s < 20

    # ---- the same cut once more from the trace that is left, and marks that no range outlives
    events = read_trace(tmp_path / "profile-quickstart.json.gz")
    assert find_step_parts(events).seconds == seconds
    ranges = [event for event in events if event["name"].startswith(RANGE_PREFIX)]
    counts = Counter(event["name"].removeprefix(RANGE_PREFIX) for event in ranges)
    micro_batches = 3 * 2
    assert counts["forward"] == counts["backward"] == counts["loss"] == micro_batches
    assert counts["MLP"] == 2 * 2 * micro_batches, "two layers, each computed twice"
    by_end = sorted(event["ts"] + event["dur"] for event in ranges if event["name"] == f"{RANGE_PREFIX}backward")
    layers = [event for event in ranges if event["name"] == f"{RANGE_PREFIX}MLP"]
    assert all(any(event["ts"] + event["dur"] <= end for end in by_end) for event in layers)

    # ---- what is said
    assert "where a step goes" in told
    assert "profiling quickstart: 9 steps on 2 ranks from fresh weights, in a temporary run folder" in told
    assert "3 steps of rank 0 of 2: " in told
    assert "the trace, for https://ui.perfetto.dev or chrome://tracing: profile-quickstart.json.gz" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "profile-quickstart.json.gz"]


def test_a_run_that_is_there_comes_before_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_profiled_recipe("quickstart") == "quickstart"
    assert find_profiled_recipe("mine.yaml") == "mine.yaml"
    for folder in ("runs/quickstart", "elsewhere/first"):
        Path(folder).mkdir(parents=True)
        Path(folder, "config.yaml").touch()
    assert find_profiled_recipe("quickstart") == "runs/quickstart/config.yaml"
    assert find_profiled_recipe("elsewhere/first") == "elsewhere/first/config.yaml"
    with pytest.raises(UserError, match="no such run or recipe: saw 'quickstrat', want a run folder, the name of one"):
        find_profiled_recipe("quickstrat")


def test_mistakes_come_before_any_step(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the trace is gzip's: saw trace.json, want a name that ends in .json.gz"):
        profile_recipe("quickstart", tiny.words(tmp_path), steps=3, ranks=1, trace=Path("trace.json"))
