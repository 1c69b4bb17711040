"""Runs side by side."""

from pathlib import Path

import numpy as np
import pytest

from smoltrain.errors import UserError
from smoltrain.monitor.compare import compare_named_runs, describe_rows, format_comparison, shorten_paths
from tests.monitor.records import make_run, step_line, validation_line


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of the same rows until the second takes others, and one without a validation or a ledger."""
    folder = tmp_path_factory.mktemp("compared")
    first = make_run(folder, "run.name=first")
    lines = [step_line(step, loss=7.0 - step / 10) for step in range(1, 13)]
    lines += [validation_line(4, 6.5), validation_line(8, 6.25), validation_line(12, 6.3)]
    second = make_run(folder, "run.name=second", "phases.main.lr=1e-3", "model.dropout=0.1", lines=lines)
    third = make_run(folder, "run.name=third", "phases.main.lr=2e-3", lines=[step_line(1)])
    digests = np.arange(1, 49, dtype="<u8")
    (first / "ledger.bin").write_bytes(digests[:32].tobytes())
    digests[20] = 99
    (second / "ledger.bin").write_bytes(digests.tobytes())
    return [first, second, third]


def test_results_differences_and_rows_are_told(folders: list[Path]) -> None:
    comparison = compare_named_runs([str(folder) for folder in folders])
    results = {row.name: row.cells for row in comparison.results}
    assert results["steps"] == ["8 of 12", "12 of 12", "1 of 12"]
    assert results["tokens trained on"] == ["512", "768", "64"]
    assert results["training loss, mean of the last 20 steps"] == ["5.5500", "6.3500", "5.9000"]
    assert results["validation loss, the last"] == ["5.5000 at 8", "6.3000 at 12", "-"]
    assert results["validation loss, the best"] == ["5.5000 at 8", "6.2500 at 8", "-"]
    assert results["tokens/s in the steps"] == ["32", "32", "32"]
    assert results["MFU in the steps"] == ["25.0%"] * 3
    assert results["time of all starts"] == ["26.0 s", "34.0 s", "12.0 s"]
    assert not any(name.startswith("validation loss at") for name in results), "one run has none"
    differences = {row.name: row.cells for row in comparison.differences}
    assert differences == {"model.dropout": ["0", "0.1", "0"], "phases.main.lr": ["0.003", "0.001", "0.002"]}
    assert comparison.verdicts[0].startswith("the same 20 rows, then they part: at row 1 of step 6 (position 20)")
    assert "no ledger.bin in " in comparison.verdicts[1]


def test_losses_at_the_last_step_that_all_have(folders: list[Path]) -> None:
    comparison = compare_named_runs([str(folder) for folder in folders[:2]])
    (cells,) = [row.cells for row in comparison.results if row.name == "validation loss at step 8"]
    assert cells == ["5.5000", "6.2500"]


def test_the_text_has_a_column_for_each_run(folders: list[Path]) -> None:
    lines = format_comparison(compare_named_runs([str(folder) for folder in folders[:2]]))
    assert lines[0].split() == ["first", "second"]
    assert [" ".join(line.split()) for line in lines if line.startswith("phases")] == ["phases.main.lr 0.003 0.001"]
    assert "rows of first and second:" in lines
    edges = [line.rfind(cell) + len(cell) for line, cell in zip(lines, ("second", "failed"), strict=False)]
    assert edges[0] == edges[1], "aligned"


def test_runs_of_one_config_say_so(tmp_path: Path, folders: list[Path]) -> None:
    same = make_run(folders[0].parent.parent, "run.name=same")
    text = "\n".join(format_comparison(compare_named_runs([str(folders[0]), str(same)])))
    assert "their configs are the same, but for name and folder" in text


def test_what_cannot_be_compared_is_said(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="so many runs cannot be compared: saw 1, want 2 to 8"):
        compare_named_runs([str(folders[0])])
    with pytest.raises(UserError, match="a run is compared with itself"):
        compare_named_runs([str(folders[0]), str(folders[0])])
    with pytest.raises(UserError, match="no such run"):
        compare_named_runs([str(folders[0]), str(tmp_path)])
    assert "cannot be compared" in describe_rows(folders[0], tmp_path)


def test_names_are_as_long_as_they_must_be() -> None:
    assert shorten_paths([Path("/a/runs/one"), Path("/a/runs/two")]) == ["one", "two"]
    assert shorten_paths([Path("/a/runs/one"), Path("/b/runs/one")]) == ["a/runs/one", "b/runs/one"]
