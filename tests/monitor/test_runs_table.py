"""The table of runs, for a terminal of any width and for a pipe."""

from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len

from smoltrain.errors import UserError
from smoltrain.monitor.run_status import RunStatus
from smoltrain.monitor.runs_table import format_age, format_runs, print_runs

NOTE = "TrainingStopped: the loss of step 120 is nan at lr 0.002; it is not finite; nothing was updated"
ONE = RunStatus(
    name="quickstart", folder="runs/quickstart", state="failed", note=NOTE, step=1120, last_step=2100, loss=4.5,
    validation_loss=4.75, validation_step=1100, tokens_per_s=4398.4, last_sign_at=1000.0,
)  # fmt: skip
NEW = RunStatus("a-name-that-is-rather-long-\x1b[31m", "runs/a", "waiting", "", 0, None, None, None, None, None, None)


def test_a_pipe_gets_a_whole_line_for_each_run() -> None:
    heading, one, new = [line.plain for line in format_runs([ONE, NEW], now_s=1180.0, width=None)]
    assert heading.split() == ["run", "state", "step", "loss", "validation", "tokens/s", "last", "sign"]
    shown = f"quickstart failed 1,120/2,100 4.5000 4.7500 at 1,100 4,398 3 min ago {NOTE}"
    assert " ".join(one.split()) == shown
    assert new.split()[1:] == ["waiting", "0", "-", "-", "-", "-"]
    assert "\x1b" not in new


@pytest.mark.parametrize("width", [20, 40, 60, 80, 140])
def test_a_terminal_gets_what_it_has_room_for(width: int) -> None:
    lines = [line.plain for line in format_runs([ONE, NEW], now_s=1180.0, width=width)]
    assert max(cell_len(line) for line in lines) <= max(width, 34)
    shown = " ".join(" ".join(lines).split())
    assert "failed" in shown
    assert "waiting" in shown
    assert NOTE.rsplit(maxsplit=1)[-1] in shown
    assert "1,120/2,100" in shown
    assert ("4.7500 at 1,100" in shown) == (width >= 80)


def test_ages_are_rounded() -> None:
    ages = [format_age(seconds) for seconds in (-5.0, 0.4, 119.0, 120.0, 7199.0, 7200.0, 200_000.0)]
    assert ages == ["0 s ago", "0 s ago", "119 s ago", "2 min ago", "120 min ago", "2 h ago", "2 days ago"]


def test_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_runs(tmp_path / "runs", is_default=True, as_json=False)
    assert capsys.readouterr().out.endswith("yet; `smoltrain train` begins one\n")
    print_runs(tmp_path / "runs", is_default=True, as_json=True)
    assert capsys.readouterr().out == "[]\n"
    with pytest.raises(UserError, match="there is no such folder"):
        print_runs(tmp_path / "runs", is_default=False, as_json=False)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match=f"this is a run: .* want a folder of runs, as {tmp_path.parent};"):
        print_runs(tmp_path, is_default=False, as_json=False)


def test_a_state_is_coloured_and_not_a_name_that_looks_like_one() -> None:
    line = format_runs([replace(ONE, name="failed", note="")], now_s=1180.0, width=100)[1]
    (span,) = line.spans
    assert (line.plain[span.start : span.end], span.start) == ("failed", len("failed") + 2)
