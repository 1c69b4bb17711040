"""launch/gpu_bench.sh for real, but on a CPU, at a tiny shape and in a few cells."""

import json
import subprocess
from pathlib import Path

import pytest

from tests import launches, tiny

SHAPE = [word for word in tiny.OVERRIDES if word.startswith("model.")]
WORDS = [*SHAPE, "batch.sequence_length=16", "batch.micro_batch=2", "batch.rows_per_step=4"]


@pytest.mark.slow
def test_every_cell_is_a_line_of_the_table_and_one_that_fails_ends_no_other(tmp_path: Path) -> None:
    own = {"BIN": str(launches.BIN), "AGAINST": "", "KERNELS": "sdpa flash", "RECOMPUTE": "full", "STAGES": "zero1"}
    own["STEPS"] = "6"
    done = subprocess.run(
        ["bash", str(launches.ROOT / "launch" / "gpu_bench.sh"), str(tmp_path / "out"), *WORDS],
        env=launches.environment() | own, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    cells = [f"sdpa-compile-{compile}-full-zero1" for compile in ("off", "on")]
    table = (tmp_path / "out" / "table.md").read_text()
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [f"| {x}" for x in ("beside-others", *cells)]
    assert done.stderr.count("failed\n") == 2, "flash needs CUDA"
    assert "error: " in done.stderr
    told = json.loads((tmp_path / "out" / f"{cells[0]}.json").read_text())["settings"]["overrides"]
    assert {"engine.attention=sdpa", "engine.compile=off", "engine.ds_config=zero1"} <= set(told)
