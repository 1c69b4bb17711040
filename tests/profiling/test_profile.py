"""smoltrain profile: real steps, whose parts add up to them."""

import sys
from pathlib import Path

import pytest

from smoltrain.profiling.profile import profile_recipe
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
    with capsys.disabled():
        print(told)
        print(profile.parts.seconds)
    assert sum(profile.parts.seconds.values()) == pytest.approx(profile.parts.wall_s, rel=1e-9)
