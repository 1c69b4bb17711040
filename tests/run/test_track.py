"""What a run writes down: read back from a real run, interrupted once, and from trackers of our own."""

import json
import math
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from smoltrain import files
from smoltrain.config.schema import Config
from smoltrain.engine.layer_gradients import LayerGradient
from smoltrain.errors import TrainingStopped
from smoltrain.estimate.speed import recipe_flops_per_token
from smoltrain.run.run_ending import read_ending
from smoltrain.run.screen import format_step_line
from smoltrain.run.sink import HISTOGRAM_PREFIX
from smoltrain.run.track import GRADIENT_NORM_PREFIX, METRICS, UPDATE_RATIO_PREFIX, WEIGHT_NORM_PREFIX, Tracker
from smoltrain.run.wandb_connection import SUMMARIES, TOKENS
from smoltrain.run.wandb_id import UNDONE_METRICS_FILE
from smoltrain.schedule import Plan
from tests import tiny, wandb_files
from tests.tiny import STEP_NUMBERS as NUMBERS
from tests.wandb_files import Offline

LAYER_PREFIXES = (GRADIENT_NORM_PREFIX, WEIGHT_NORM_PREFIX, UPDATE_RATIO_PREFIX)


# ---- one real run: the first phase, the end, and in a second process the other phase


@dataclass
class Story:
    settings: Config
    outputs: list[subprocess.CompletedProcess[str]]
    lines: list[dict[str, Any]]  # metrics.jsonl
    samples: list[dict[str, Any]]  # samples.jsonl
    wandb: list[tuple[Path, Offline]]  # each offline folder and what its file holds

    @property
    def steps(self) -> dict[int, dict[str, Any]]:
        """Everything in metrics.jsonl at each step."""
        steps: dict[int, dict[str, Any]] = {}
        for line in self.lines:
            steps.setdefault(line["step"], {}).update(line)
        return steps


def json_lines(path: Path) -> list[dict[str, Any]]:
    return list(files.read_jsonl(path))


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("story")
    words = ("track.wandb=offline", "track.wandb_model=phase")
    outputs = [
        tiny.train(folder, *words, "run.stop_after=main", WANDB_DATA_DIR=str(folder)),
        tiny.train(folder, *words, WANDB_DATA_DIR=str(folder)),
    ]
    for output in outputs:
        assert output.returncode == 0, output.stdout + output.stderr
    settings = tiny.load(folder, *words)
    run = settings.run_folder
    offline = [(path.parent, wandb_files.read_finished(path)) for path in run.glob("wandb/offline-run-*/run-*.wandb")]
    offline.sort(key=lambda pair: min(pair[1].steps))
    return Story(settings, outputs, json_lines(run / "metrics.jsonl"), json_lines(run / "samples.jsonl"), offline)


def test_wandb_itself_says_nothing(story: Story) -> None:
    for output in story.outputs:
        assert "wandb: " not in output.stdout + output.stderr


OF_SEVERAL_RANKS = {
    "speed/communication_mb",
    "speed/communication_s",
    "speed/rank_wait_s",
}  # tests/training/test_step.py
# Of what is measured besides where a recipe asks for it: tests/training/test_evaluate_tasks.py, test_memorise.py there.
ELSEWHERE = (
    {"speed/task_evaluation_s", "speed/memorisation_s"}
    | OF_SEVERAL_RANKS
    | {name for name in METRICS if name.startswith("memorisation/")}
)


def test_every_listed_name_is_logged_and_no_other(story: Story) -> None:
    logged = {key for line in story.lines for key in line} - {"step", "time_s"}
    by_layer = {key for key in logged if key.startswith(LAYER_PREFIXES)}
    assert logged - by_layer == set(METRICS) - ELSEWHERE
    layers = ("embed_tokens", "layers.00", "layers.01", "norm")
    assert by_layer == {prefix + layer for prefix in LAYER_PREFIXES for layer in layers}


def test_every_listed_name_says_what_it_is() -> None:
    for name, meaning in METRICS.items():
        assert re.fullmatch(r"(train|data|speed|memory|validation|memorisation)/[a-z_0-9]+", name)
        assert len(meaning.split()) >= 4, name


def test_each_step_is_there_once_with_finite_numbers(story: Story) -> None:
    whole = [line for line in story.lines if "train/loss_nats_per_token" in line]
    assert [line["step"] for line in whole] == list(range(1, 13))
    for line in story.lines:
        assert all(math.isfinite(v) for v in line.values() if not isinstance(v, str))
    losses = [line["train/loss_nats_per_token"] for line in whole]
    assert math.log(320) + 1 > losses[0] > losses[7] > 0
    assert len({line["data/ledger"] for line in whole}) == 12
    assert [line["time_s"] for line in whole] == sorted(line["time_s"] for line in whole)


def test_lr_and_weight_decay_are_the_plans_across_the_boundary_and_the_resume(story: Story) -> None:
    plan = Plan(story.settings.phases)
    for step, line in story.steps.items():
        assert line["train/lr"] == pytest.approx(plan.lr(step), rel=0, abs=1e-12)
        assert line["train/weight_decay"] == pytest.approx(plan.weight_decay(step), rel=0, abs=1e-12)
    assert story.steps[8]["train/weight_decay"] == 0.1
    assert story.steps[9]["train/weight_decay"] == 0.02
    assert story.steps[9]["train/lr"] == 3e-4


def test_tokens_and_rates_add_up(story: Story) -> None:
    per_step = 2 * 2 * 16  # micro-batch x accumulation x sequence length, one rank
    epochs = [line["data/epochs"] for line in story.steps.values()]
    for step, line in story.steps.items():
        assert line["data/tokens"] == per_step * step
        assert line["data/epochs"] == pytest.approx(step * epochs[0])
        assert line["speed/tokens_per_s"] * line["speed/step_s"] == pytest.approx(per_step)
        assert 0 <= line["speed/data_wait_share"] <= 1
        assert 0.05 < line["memory/peak_gib"] < 16
        assert line["train/skipped_updates"] == 0


def test_mfu_is_tokens_per_second_times_one_factor_in_each_start(story: Story) -> None:
    flops_per_token = recipe_flops_per_token(story.settings)
    for output, steps in zip(story.outputs, (range(1, 9), range(9, 13)), strict=True):
        (teraflops,) = re.findall(
            r"^peak +([\d.,]+) TFLOP/s bf16, measured on this machine", output.stdout, re.MULTILINE
        )
        for step in steps:
            line = story.steps[step]
            peak_flops = line["speed/tokens_per_s"] * flops_per_token / line["speed/mfu"]
            assert peak_flops / 1e12 == pytest.approx(float(teraflops), abs=0.006), "the one that the start says"


def test_each_start_tells_how_long_it_took_to_begin_and_to_leave(story: Story) -> None:
    for name, steps in (("speed/start_s", [1, 9]), ("speed/closing_s", [8, 12])):
        assert [line["step"] for line in story.lines if name in line] == steps
    for name, steps in (("speed/evaluation_s", [4, 8, 12]), ("speed/sampling_s", [6, 8, 12])):
        assert [line["step"] for line in story.lines if name in line] == steps
        assert all(line[name] > 0 for line in story.lines if name in line)


def test_cadences_hold_and_the_end_of_a_phase_is_always_due(story: Story) -> None:
    def where(key: str) -> list[int]:
        return [line["step"] for line in story.lines if key in line]

    assert where("validation/loss_nats_per_token") == [4, 8, 12]
    assert where(GRADIENT_NORM_PREFIX + "norm") == [4, 8, 12]
    assert [line["step"] for line in story.samples] == [6, 6, 8, 8, 12, 12]
    assert {line["prompt"] for line in story.samples} == set(story.settings.sample.prompts)
    for line in (story.steps[step] for step in (4, 8, 12)):
        assert line["validation/perplexity"] == pytest.approx(math.exp(line["validation/loss_nats_per_token"]))
        norms = [value for key, value in line.items() if key.startswith(GRADIENT_NORM_PREFIX)]
        whole = math.sqrt(sum(norm**2 for norm in norms))
        assert whole == pytest.approx(line["train/grad_norm_before_clipping"], rel=1e-3)  # of bf16 gradients


def test_a_pipe_gets_plain_lines(story: Story) -> None:
    for output in story.outputs:
        assert {c for c in output.stdout if not c.isprintable()} == {"\n"}
        assert "Traceback" not in output.stderr
        assert "\x1b" not in output.stderr
    first, second = (output.stdout.splitlines() for output in story.outputs)
    assert [line.split()[1] for line in first if line.startswith("step ")] == ["2/8", "4/8", "6/8", "8/8"]
    assert [line.split()[1] for line in second if line.startswith("step ")] == ["10/12", "12/12"]
    assert any(line.startswith("quickstart: phase main is complete (step 8 of 12)") for line in first)
    assert any(line.startswith("quickstart: the plan is complete (12 steps)") for line in second)
    assert "done: 12 of 12 steps" in second
    assert any(line.startswith("restored step 8 on 1 ranks, ledger ") for line in second)


def test_the_console_shows_the_numbers_of_the_file(story: Story) -> None:
    for output in story.outputs:
        for line in output.stdout.splitlines():
            if match := re.match(r"step +(\d+)/(\d+) (\w+)  loss ", line):
                step, last = int(match[1]), int(match[2])
                told, _, left = line.rpartition("  left ")
                assert told == format_step_line(step, last, match[3], story.steps[step], None).rpartition("  left ")[0]
                assert re.fullmatch(r"\d+:\d\d", left), "a median of several steps, which no line of the file has"


def test_the_log_of_the_rank_has_all_that_was_said_in_both_processes(story: Story) -> None:
    log = (story.settings.run_folder / "logs" / "rank0.log").read_text(encoding="utf-8")
    for output in story.outputs:
        for line in output.stdout.splitlines():
            if not line.startswith("    "):  # of a sample the console replaces control characters
                assert line in log
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ smoltrain INFO W&B ", log)


def test_what_was_chosen_is_said_with_its_reason(story: Story) -> None:
    said = {line[:22].strip(): line[23:] for line in story.outputs[0].stdout.splitlines()}
    wandb_id = story.wandb[0][1].run_id
    assert said["W&B"] == f"offline, as track.wandb asks; run id {wandb_id}"
    for what in ("precision", "attention kernel", "gradient checkpointing", "engine"):
        assert ", " in said[what], what


# ---- the same run as W&B keeps it


def test_wandb_has_one_run_in_two_files(story: Story) -> None:
    assert len(story.wandb) == 2
    provenance = yaml.safe_load((story.settings.run_folder / "config.yaml").read_text(encoding="utf-8"))["provenance"]
    assert [offline.run_id for _, offline in story.wandb] == [provenance["wandb_id"]] * 2
    assert [start["from_step"] for start in provenance["starts"]] == [0, 8]
    assert [offline.exit_code for _, offline in story.wandb] == [0, 0]
    first, second = (set(offline.steps) for _, offline in story.wandb)
    assert (first, second) == (set(range(1, 9)), set(range(9, 13)))
    for _, offline in story.wandb:
        assert offline.config["model"]["hidden_size"] == 32
        assert offline.config["phases"][0]["name"] == "main"


def test_wandb_has_the_numbers_of_the_file_at_their_steps(story: Story) -> None:
    logged = {step: values for _, offline in story.wandb for step, values in offline.steps.items()}
    for step, line in story.steps.items():
        numbers = {k: v for k, v in line.items() if not isinstance(v, str) and k not in ("step", "time_s")}
        assert {k: v for k, v in logged[step].items() if k in numbers} == numbers
        assert "data/ledger" not in logged[step], "W&B takes numbers"
        assert logged[step]["_step"] == step


def test_wandb_has_a_histogram_per_layer(story: Story) -> None:
    entries = {"embed_tokens": 320 * 32, "norm": 32, "layers.00": 9280, "layers.01": 9280}
    logged = {step: values for _, offline in story.wandb for step, values in offline.steps.items()}
    for step, values in logged.items():
        found = {key.removeprefix(HISTOGRAM_PREFIX) for key in values if key.startswith("gradients/histogram")}
        assert found == (set(entries) if step in (4, 8, 12) else set())
        for layer in found:
            histogram = values[HISTOGRAM_PREFIX + layer]
            assert histogram["_type"] == "histogram"
            assert sum(histogram["values"]) == entries[layer]
            assert len(histogram["bins"]) == len(histogram["values"]) + 1


def test_wandb_has_the_model_of_each_phase(story: Story) -> None:
    artifacts = [artifact for _, offline in story.wandb for artifact in offline.artifacts]
    models = [a for a in artifacts if a["type"] == "model"]
    losses = {step: line["validation/loss_nats_per_token"] for step, line in story.steps.items() if step in (8, 12)}
    best = ["best"] if losses[12] < losses[8] else []
    assert {a["name"] for a in models} == {"quickstart-model"}
    assert [set(a["aliases"]) for a in models] == [
        {"step-8", "latest", "main", "best"}, {"step-12", "latest", "continuation", *best},
    ]  # fmt: skip
    for artifact, step in zip(models, (8, 12), strict=True):
        weights = story.settings.run_folder / "checkpoints" / f"step-{step:08d}" / "model.safetensors"
        assert artifact["files"]["model.safetensors"] == weights.stat().st_size
        assert {"config.yaml", "tokenizer/tokenizer.json"} <= set(artifact["files"])


def test_wandb_has_a_table_of_samples_of_which_it_is_sent_what_is_new(story: Story) -> None:
    """Offline the second process does not know what the first one sent, and begins with all."""
    new_steps = {6: {6}, 8: {8}, 12: {6, 8, 12}}
    for folder, offline in story.wandb:
        shown = {step: values["samples"] for step, values in offline.steps.items() if "samples" in values}
        assert set(shown) == set(new_steps) & set(offline.steps)
        for step, table in shown.items():
            assert table["_type"] == "incremental-table-file"
            content = json.loads((folder / "files" / table["path"]).read_text(encoding="utf-8"))
            assert content["columns"] == ["step", "prompt", "text"]
            new = [line for line in story.samples if line["step"] in new_steps[step]]
            assert content["data"] == [[line["step"], line["prompt"], line["text"]] for line in new]


def test_wandb_has_every_panel_and_no_other(story: Story) -> None:
    texts = {"data/ledger"}
    layers = ("embed_tokens", "layers.00", "layers.01", "norm")
    by_layer = {prefix + layer for prefix in (*LAYER_PREFIXES, HISTOGRAM_PREFIX) for layer in layers}
    panels: set[str] = set()
    for _, offline in story.wandb:
        for values in offline.steps.values():
            panels |= {name for name in values if name[0] != "_"}  # W&B's own: _step, _runtime, _timestamp
    assert panels == (set(METRICS) - texts - ELSEWHERE) | by_layer | {"samples"}


def test_wandb_knows_the_axis_and_the_summaries_of_each_metric(story: Story) -> None:
    assert set(SUMMARIES) | {TOKENS} <= set(METRICS)
    for _, offline in story.wandb:
        told = {name: (axis, summaries) for name, (axis, summaries) in offline.defined.items() if name in METRICS}
        assert told == {TOKENS: ("", {"last"})} | {
            name: (TOKENS if name.startswith("validation/") else "", set(summary.split(",")))
            for name, summary in SUMMARIES.items()
        }


def test_wandb_has_what_follows_from_the_config(story: Story) -> None:
    parameters = 320 * 32 + 2 * 9280 + 32
    for (_, offline), resumed_from in zip(story.wandb, (0, 8), strict=True):
        facts = offline.config["derived"]
        known = {
            "parameters": parameters, "tokens_per_step": 64, "rows_per_step": 4, "micro_batch_rows": 2,
            "accumulation": 2, "planned_steps": 12, "planned_tokens": 12 * 64, "world_size": 1, "machines": 1,
            "device": "cpu", "precision": "bf16", "zero_stage": 2, "gradient_checkpointing": "full",
            "resumed_from_step": resumed_from, "model_flops_per_token": recipe_flops_per_token(story.settings),
        }  # fmt: skip
        assert {name: facts[name] for name in known} == known
        assert facts["peak_flops_all_ranks"] > 0
        assert facts["attention_kernel"]
        assert facts["loss_kernel"]
        assert facts["gradient_reduction"].startswith("once per step")
        assert torch.__version__.startswith(facts["versions"]["torch"])  # which may have the CUDA version behind it
        assert facts["git_commit"]
        assert offline.job_type == "train"


def test_wandb_has_the_recipe_and_the_log(story: Story) -> None:
    for (folder, offline), output in zip(story.wandb, story.outputs, strict=True):
        assert offline.saved["quickstart/config.yaml"] == "NOW"
        assert (folder / "files" / "quickstart" / "config.yaml").exists()
        log = "".join(offline.log).splitlines()
        steps = [line for line in output.stdout.splitlines() if line.startswith(("step ", "validation", "engine "))]
        assert len(steps) > 2
        assert set(steps) <= set(log)


# ---- trackers of our own


def opened(folder: Path, *overrides: str, rank: int = 0, first_step: int = 0) -> Tracker:
    settings = tiny.load(folder, *overrides)
    settings.run_folder.mkdir(parents=True, exist_ok=True)
    return Tracker(settings, tiny.run_folder(settings.run_folder), rank, first_step, 12)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["train/loss", "gradients/histogram/norm", ""])
def test_an_unlisted_name_is_refused_on_every_rank(tmp_path: Path, name: str, rank: int) -> None:
    tracker = opened(tmp_path, rank=rank)
    with pytest.raises(KeyError, match=r"is not in track\.METRICS"):
        tracker.log_metrics(1, {"train/lr": 0.5, name: 1.0})
    tracker.close(1)


def test_other_ranks_only_keep_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = opened(tmp_path, "track.wandb=online", rank=1)
    tracker.say("hello")
    tracker.log_step(1, 12, "main", dict(NUMBERS))
    tracker.log_gradients(1, {"norm": LayerGradient(1.0, np.array([1]), np.array([0.0, 1.0]))})
    tracker.log_samples(1, [("a", "b")])
    tracker.close(0)
    assert capsys.readouterr() == ("", "")
    run = tmp_path / "runs" / "quickstart"
    assert sorted(p.relative_to(run).as_posix() for p in run.rglob("*")) == ["logs", "logs/rank1.log"]
    assert "smoltrain INFO hello" in (run / "logs" / "rank1.log").read_text(encoding="utf-8")


def test_an_error_that_ends_a_run_is_written_down_until_the_next_start(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "quickstart"
    with pytest.raises(TrainingStopped), opened(tmp_path):
        raise TrainingStopped("the disk\nis full")
    assert read_ending(run) == ("failed", "TrainingStopped: the disk is full")
    with opened(tmp_path) as tracker:
        assert read_ending(run) is None
        tracker.record_ending("stopped", "after step 3 (SIGTERM)")
    assert read_ending(run) == ("stopped", "after step 3 (SIGTERM)")
    with opened(tmp_path, rank=1) as other:
        other.record_ending("done", "rank 0 alone writes it")
    assert read_ending(run) == ("stopped", "after step 3 (SIGTERM)")


def test_a_step_that_is_done_again_is_kept_aside_and_reaches_wandb_once(tmp_path: Path) -> None:
    run, told = tmp_path / "runs" / "quickstart", []
    for first_step, last_step in ((0, 5), (3, 4), (3, 7)):  # two kills after the checkpoint of step 3
        tracker = opened(tmp_path, "track.wandb=offline", first_step=first_step)
        for step in range(first_step + 1, last_step + 1):
            tracker.log_metrics(step, {"train/lr": step / 10})
        tracker.close(0)
    assert [line["step"] for line in json_lines(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["step"] for line in json_lines(run / UNDONE_METRICS_FILE)] == [4, 5, 4]
    for path in run.glob("wandb/offline-run-*/run-*.wandb"):
        told += wandb_files.read_finished(path).steps
    assert sorted(told) == [1, 2, 3, 4, 5, 6, 7]


def test_the_best_validation_is_that_of_the_whole_run_also_after_a_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def validate(first_step: int, losses: dict[int, float]) -> list[bool]:
        tracker = opened(tmp_path, first_step=first_step)
        for step, loss in losses.items():
            tracker.log_validation(step, loss, 1.0, {"speed/evaluation_s": 2.0})
        tracker.close(0)
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("validation")]
        return ["best so far" in line for line in said]

    assert validate(0, {1: math.nan, 2: 4.0, 3: 3.5, 4: 3.75, 5: 3.5}) == [False, True, True, False, False]
    assert validate(4, {5: 3.6, 6: 3.25, 7: 3.0}) == [False, True, True]
    assert validate(6, {7: 3.125}) == [True], "the loss of step 7 was undone"
    lines = json_lines(tmp_path / "runs" / "quickstart" / "metrics.jsonl")
    best = [line.get("validation/best_loss_nats_per_token") for line in lines]
    assert best == [None, 4.0, 3.5, 3.5, 3.5, 3.25, 3.125]
    assert {line["speed/evaluation_s"] for line in lines} == {2.0}


def test_every_line_is_on_disk_before_the_next_step(tmp_path: Path) -> None:
    tracker = opened(tmp_path)
    tracker.log_metrics(1, {"train/lr": 0.5, "train/grad_norm_before_clipping": math.inf})
    (line,) = json_lines(tmp_path / "runs" / "quickstart" / "metrics.jsonl")
    assert line["train/grad_norm_before_clipping"] == math.inf
    tracker.close(0)


def test_what_a_model_samples_cannot_command_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "[bold]a\x1b[2J\x1b]0;title\x07b\rc\td\x00\x9b1m\u202e\ne"
    tracker = opened(tmp_path)
    capsys.readouterr()
    tracker.log_samples(6, [("p: ", text)])
    tracker.close(0)
    printed = capsys.readouterr().out
    assert {c for c in printed if not c.isprintable()} <= {"\n", "\t"}
    assert printed.startswith("sample at step 6:\n    p: [bold]a\ufffd[2J\ufffd]0;title\ufffdb\n    c")
    assert json_lines(tmp_path / "runs" / "quickstart" / "samples.jsonl")[0]["text"] == text, "the file has it all"


def test_a_later_start_of_the_same_command_shows_only_what_is_chosen_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny.load(tmp_path)
    settings.run_folder.mkdir(parents=True)
    said: list[list[str]] = []
    for number, kernel in enumerate(("blocked", "blocked", "SDPA")):
        folder = tiny.run_folder(settings.run_folder)
        with Tracker(settings, folder, 0, 0, 12, choices_were_said=number > 0) as tracker:
            tracker.say_choice("attention kernel", kernel)
            tracker.say_choice("loss kernel", "fused")
            tracker.say("restored")
        said.append(capsys.readouterr().out.splitlines()[number == 0 :])  # without W&B's
    assert said == [
        ["attention kernel       blocked", "loss kernel            fused", "restored"],
        ["restored"],
        ["attention kernel       SDPA", "restored"],
    ]
    log = (settings.run_folder / "logs" / "rank0.log").read_text(encoding="utf-8")
    assert log.count("loss kernel            fused") == 3, "the log has all of each start"


def test_the_console_keeps_its_cadence_and_never_leaves_out_the_last_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = opened(tmp_path, "track.print_every=5")
    for step in range(1, 13):
        tracker.log_step(step, 12, "main", dict(NUMBERS))
    tracker.close(0)
    printed = [line[:12] for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert printed == ["step  5/12 m", "step 10/12 m", "step 12/12 m"]
    assert len(json_lines(tmp_path / "runs" / "quickstart" / "metrics.jsonl")) == 12


def test_a_terminal_gets_a_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    tracker = opened(tmp_path, "track.print_every=5", first_step=3)
    for step in range(4, 13):
        tracker.log_step(step, 12, "continuation", dict(NUMBERS))
    tracker.close(0)
    printed = capsys.readouterr().out
    assert "12/12" in printed
    assert "continuation" in printed
    assert "\x1b[?25h" in printed, "the cursor is back"
