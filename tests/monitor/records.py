"""Run folders with records made by hand: a config.yaml as a start writes it, and lines as a tracker does."""

from pathlib import Path
from typing import Any

from smoltrain import files
from tests import tiny

BEGAN_AT = 1_000_000.0  # the clock of these records
STEP_S = 2.0
START_S = 10.0
TOKENS = 64  # of a step


def step_line(step: int, loss: float | None = None, **more: Any) -> dict[str, Any]:
    """As a step logs it: the first one ends 12 s after its start began."""
    start = {"speed/start_s": START_S} if step == 1 else {}
    return {
        "step": step, "time_s": BEGAN_AT + START_S + STEP_S * step,
        "train/loss_nats_per_token": 6.0 - step / 10 if loss is None else loss, "train/lr": 1e-3,
        "train/grad_norm_before_clipping": 1.5, "data/tokens": TOKENS * step, "data/rows": 4 * step,
        "data/ledger": "0" * 32, "speed/tokens_per_s": TOKENS / STEP_S, "speed/step_s": STEP_S,
        "train/skipped_updates": 0, "memory/peak_gib": 0.5, "speed/mfu": 0.25, **start, **more,
    }  # fmt: skip


def validation_line(step: int, loss: float) -> dict[str, Any]:
    """As an evaluation logs it, at once after its step."""
    return {
        "step": step, "time_s": BEGAN_AT + START_S + STEP_S * step, "validation/loss_nats_per_token": loss,
        "validation/best_loss_nats_per_token": loss, "speed/evaluation_s": 0.0,
    }  # fmt: skip


def write_lines(path: Path, lines: list[dict[str, Any]], mode: str = "w") -> None:
    """Lines of a .jsonl, sealed as the run seals them."""
    with path.open(mode, encoding="utf-8") as file:
        file.writelines(files.format_json_line(line) for line in lines)


def make_run(folder: Path, *overrides: str, lines: list[dict[str, Any]] | None = None) -> Path:
    """A run of 12 planned steps with these lines of metrics.jsonl, by default 8 steps and two validations."""
    run = tiny.enter_run_folder(tiny.load(folder, *overrides), 1, 0).path
    (run / "logs").mkdir()
    if lines is None:
        lines = [step_line(step) for step in range(1, 9)]
        lines[4:4] = [validation_line(4, 5.75)]
        lines.append(validation_line(8, 5.5))
    write_lines(run / "metrics.jsonl", lines)
    return run
