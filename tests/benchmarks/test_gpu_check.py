"""launch/gpu_check.sh for real, but on a CPU and at a tiny shape."""

import subprocess
from pathlib import Path

import pytest

from benchmarks import gpu_check, gpu_proofs
from benchmarks.gpu_proofs import ProofFailed, compare_runs
from benchmarks.parts import CUT, NOT_RUN, PASS, Verdict
from smoltrain import files
from tests import launches

SCRIPT = launches.ROOT / "launch" / "gpu_check.sh"


@pytest.mark.slow
def test_every_part_runs_and_the_page_has_what_each_found(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        ["bash", str(SCRIPT), "run", "1200", "--tiny"], cwd=tmp_path, text=True, check=False, timeout=1500,
        env=launches.environment() | {"BIN": str(launches.BIN), "OUT": str(out)}, capture_output=True,
    )  # fmt: skip
    verdicts = dict(line.split(": ", 1) for line in done.stdout.partition("== verdicts\n")[2].splitlines())
    assert [text.partition(",")[0] for text in list(verdicts.values())[:-1]] == [
        "not run", "pass", "pass", "pass", "pass", "pass"
    ], done.stdout[-3000:] + done.stderr[-2000:]  # fmt: skip
    assert done.returncode == 3, "tests/gpu did not run"
    page = (out / "cpu.md").read_text()
    assert Path(verdicts["page"]) == out / "cpu.md"
    assert "`launch/gpu_check.sh run" in page
    assert "deepspeed 0.19" in page
    assert "| tests | not run | " in page
    assert "no CUDA device: tests/gpu would be skipped" in page
    assert "the killed run began at step 1 and at step " in page
    assert "zero3:" in page
    assert "| ours, as shipped | attention " in page
    assert "| attention flash | refused: the kernel flash cannot run" in page
    assert "| plain loop, eager | as its users would | " in page
    assert "the least that this device needs for it is " in page
    assert "| matrix products | " in page


def test_a_word_that_is_none_gets_the_usage() -> None:
    done = subprocess.run(["bash", str(SCRIPT), "bench"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "launch/gpu_check.sh pack FOLDER" in done.stderr
    assert "launch/gpu_check.sh run [LIMIT_S]" in done.stderr


def test_without_wheels_it_says_what_is_missing(tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "WHEELS": str(tmp_path)}
    done = subprocess.run(["bash", str(SCRIPT), "run"], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: no wheels: saw none in {tmp_path}, want ")


def test_the_table_comes_last_and_has_all_that_is_left(tmp_path: Path) -> None:
    parts = gpu_check.list_parts(480.0, tmp_path, tiny=False)
    assert [part.name for part in parts] == ["tests", "quickstart", "resume", "zero", "profile", "table"]
    assert parts[-1].limit_s == 480.0
    assert sum(part.limit_s for part in parts[:-1]) < 480.0


def test_a_page_keeps_what_a_part_that_was_cut_has_printed(tmp_path: Path) -> None:
    (tmp_path / "table.log").write_text("| cell | tokens/s |\n|---|---|\n| ours | 330,000 |\n")
    (tmp_path / "zero.log").write_text("zero1-step:\n5 steps: the same bits\n")
    verdicts = {"zero": Verdict(PASS, 30.2, "a | b"), "tests": Verdict(NOT_RUN, 0.0, "x"), "table": Verdict(CUT, 9, "")}
    page = gpu_check.format_page("# head", verdicts, tmp_path)
    assert "| zero | pass | 30 | a / b |" in page
    assert page.endswith("## table\n\n| cell | tokens/s |\n|---|---|\n| ours | 330,000 |\n")
    assert "```\nzero1-step:\n5 steps: the same bits\n```" in page


def write_run(folder: Path, losses: list[float], sha256: str) -> Path:
    checkpoint = folder / "checkpoints" / f"step-{len(losses):08d}"
    checkpoint.mkdir(parents=True)
    lines = [
        files.format_json_line({"step": step, gpu_proofs.LOSS: loss, "train/grad_norm_before_clipping": 1.0})
        for step, loss in enumerate(losses, 1)
    ]
    (folder / files.METRICS_FILE).write_text("".join(lines))
    record = {"bytes": 1, "sha256": sha256}
    files.write_json_file(checkpoint / "manifest.json", {"files": {"model.safetensors": record, "other": record}})
    return folder


def test_runs_that_differ_in_a_bit_are_found_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_run(tmp_path / "one", [3.0, 2.0], "aa")
    compare_runs(one, write_run(tmp_path / "same", [3.0, 2.0], "aa"), 2)
    assert capsys.readouterr().out == "2 steps and model.safetensors: the same bits\n"
    with pytest.raises(ProofFailed, match="differs in 1 of 2 steps, first in step 2"):
        compare_runs(one, write_run(tmp_path / "loss", [3.0, 2.0000001], "aa"), 2)
    with pytest.raises(ProofFailed, match=r"the checkpoints of step 2 differ in model\.safetensors"):
        compare_runs(one, write_run(tmp_path / "weights", [3.0, 2.0], "ab"), 2)
    with pytest.raises(ProofFailed, match="differs in 2 of 2 steps"):
        compare_runs(write_run(tmp_path / "none", [], "aa"), one, 2)
