"""Run folders made by hand, as a run would have written them: numbers that are known, in no time."""

import json
import math
from pathlib import Path
from typing import Any

from smoltrain.config.schema import Config
from smoltrain.files import format_json_line
from smoltrain.schedule import Plan
from tests import tiny

ROWS, TOKENS, STEP_S, BEGAN_AT = 4, 64, 0.5, 1_700_000_000.0
LAYERS = ("embed_tokens", "layers.00", "layers.01", "norm")


def make_run(folder: Path, *overrides: str, num_steps: int = 12, more: dict[str, Any] | None = None) -> Path:
    """The folder of a run of so many steps, each of `STEP_S` seconds; `more` stands in every step's line too."""
    config = tiny.load(folder, *overrides)
    tiny.enter_run_folder(config, 1, 0)
    run = config.run_folder
    (run / "logs").mkdir()
    write_metrics(run, config, num_steps, more or {})
    samples = [
        {"step": step, "prompt": prompt, "text": f"{prompt} at {step}"} for step in (6, 12) for prompt in ("A", "B")
    ]
    write_lines(run / "samples.jsonl", samples)
    return run


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(map(format_json_line, lines)))


def write_metrics(run: Path, config: Config, num_steps: int, more: dict[str, Any]) -> None:
    """metrics.jsonl: a loss that falls from 9 to 3, and a validation a nat above it every fourth step."""
    plan = Plan(config.phases)
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, num_steps + 1):
            loss = 3 + 6 * math.exp(-(step - 1) / 3)
            line = make_step_line(plan, step, loss) | more
            file.write(format_json_line(line))
            if step % 4 == 0:
                validation = {"validation/loss_nats_per_token": loss + 1, "validation/bits_per_byte": loss / 2}
                file.write(format_json_line({"step": step, "time_s": line["time_s"] + 0.1, **validation}))
                norms = {f"gradients/norm_before_clipping/{name}": 0.1 * step for name in LAYERS}
                file.write(format_json_line({"step": step, "time_s": line["time_s"] + 0.1, **norms}))


def make_step_line(plan: Plan, step: int, loss: float) -> dict[str, Any]:
    line: dict[str, Any] = {
        "step": step, "time_s": BEGAN_AT + STEP_S * step, "train/loss_nats_per_token": loss,
        "train/lr": plan.lr(min(step, plan.last_step)), "train/weight_decay": 0.1,
        "train/grad_norm_before_clipping": 1 / step, "train/loss_scale": 1.0, "train/skipped_updates": 0,
        "data/rows": ROWS * step, "data/tokens": TOKENS * step, "data/epochs": step / 10,
        "data/unique_rows": ROWS * min(step, 10), "data/unique_documents": step // 2,
        "data/repeat_factor": max(1.0, step / 10), "data/bad_records": 0, "data/ledger": "ab" * 16,
        "speed/tokens_per_s": TOKENS / STEP_S, "speed/mfu": 0.25, "speed/step_s": STEP_S, "speed/steps_per_s": 2.0,
        "speed/data_wait_share": 0.01, "memory/peak_gib": 1.5 if step <= 8 else 1.25,
    }  # fmt: skip
    return line | ({"speed/start_s": 2.0} if step == 1 else {})


def rewrite_metrics(run: Path, change: Any) -> None:
    """Each line of metrics.jsonl as `change` makes it; a line of which it makes nothing is left out."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    changed = [change({name: value for name, value in line.items() if name != "crc32"}) for line in lines]
    write_lines(run / "metrics.jsonl", [line for line in changed if line])
