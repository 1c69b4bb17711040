"""The examples run, as they are shipped, and finish."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "quickstart.ipynb"
SCRIPTS = {  # what its last lines say
    "train_and_generate": " nats per token: To be, or not to be",
    "own_dataset_and_metric": "the model adds: 2 + 2 = ",
    "own_model": " nats per token",
}


def test_every_example_is_run_here() -> None:
    shell = "whole_path.sh"  # tests/whole_runs/test_whole_path.py
    assert {path.name for path in EXAMPLES.iterdir()} == {*(f"{name}.py" for name in SCRIPTS), NOTEBOOK.name, shell}
    assert max(len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")) <= 40


def test_the_notebook_is_stored_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 4
    assert [(cell.outputs, cell.execution_count) for cell in code] == [([], None)] * len(code)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_to_its_end_and_again(name: str, tmp_path: Path) -> None:
    script = str(EXAMPLES / f"{name}.py")
    done = subprocess.run(
        [sys.executable, script, "here"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"},  # tests share the cores
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert SCRIPTS[name] in "\n".join(done.stdout.splitlines()[-4:])
    assert "Traceback" not in done.stderr
    assert len(list((tmp_path / "here").glob("example-*/checkpoints/step-00000035"))) == 1


@pytest.mark.slow
def test_the_notebook_runs_with_a_bar_and_twice(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    client = NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", environment)
        client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    texts = [output.get("text", "") or output["data"].get("text/plain", "") for output in outputs]
    assert sum(text.startswith("step 35 of 35: loss ") for text in texts) == 2, "a bar for each run, at its end"
    assert any("<progress" in output.get("data", {}).get("text/html", "") for output in outputs)
    assert any(text.startswith("<Run ") and "step 35 of 35>" in text for text in texts)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.get("name") == "stderr"]
