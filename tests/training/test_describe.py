"""The lines by which a start says what it does."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from smoltrain.config.schema import EvaluateSection, OptimizerSection
from smoltrain.distributed.cpu_cores import CpuShare
from smoltrain.engine.deepspeed_steps import DeepSpeedSteps
from smoltrain.kernels.compile import note_compiled
from smoltrain.model.interface import ComputeOptions
from smoltrain.training import describe
from smoltrain.training.describe import (
    describe_compiled_code,
    describe_device,
    describe_few_validation_rows,
    describe_host_wait,
    describe_optimizer,
    name_compiled_code,
    warn_of_unknown_memorisation,
)
from smoltrain.training.preflight import PreflightLine
from tests import tiny


def test_a_run_of_streams_says_that_it_cannot_know_what_the_model_copies() -> None:
    streamed: Any = SimpleNamespace(train=())
    cached: Any = SimpleNamespace(train=("tokens",))
    asked = EvaluateSection(memorisation_every=5)
    warning = warn_of_unknown_memorisation(asked, streamed)
    assert warning
    assert warning.startswith("WARNING: evaluate.memorisation_every measures nothing: the training tokens are streamed")
    assert warning.endswith("data.mode=cached keeps them")
    assert warn_of_unknown_memorisation(asked, cached) is None
    assert warn_of_unknown_memorisation(EvaluateSection(), streamed) is None


def test_fewer_validation_rows_than_are_asked_for_are_told() -> None:
    asked = EvaluateSection(every=5, rows=64)
    told = describe_few_validation_rows(asked, 40)
    assert told == "40 rows, as no more are held out; evaluate.rows asks for 64"
    assert describe_few_validation_rows(asked, 64) is None
    assert describe_few_validation_rows(EvaluateSection(rows=64), 40) is None, "nothing is evaluated"


@pytest.mark.parametrize(
    ("size", "cuda", "words"),
    [
        (1, False, "1 CPU rank, 2 threads each, not bound, gloo; no CUDA device was found"),
        (2, True, "2 CPU ranks, 2 threads each, not bound, gloo; CUDA was not asked for"),
    ],
)
def test_the_device_is_named_with_what_else_there_is(
    monkeypatch: pytest.MonkeyPatch, size: int, cuda: bool, words: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    share = CpuShare(2, frozenset(), "not bound")
    world: Any = SimpleNamespace(device=torch.device("cpu"), size=size, cpu_share=share)
    assert describe_device(world) == words


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({}, "SPLIT"),
        ({"kind": "muon"}, "SPLIT; 5 Newton-Schulz iterations in bf16, as asked"),
        (
            {"kind": "muon", "newton_schulz_steps": 3, "embedding_lr_factor": 2.5},
            "SPLIT; 3 Newton-Schulz iterations in bf16, as asked; embeddings and head at 2.5 x lr",
        ),
    ],
)
def test_the_optimizer_is_told_with_how_muon_computes(
    monkeypatch: pytest.MonkeyPatch, section: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(describe, "choose_dtype", lambda device: (torch.bfloat16, "bf16, as asked"))
    assert describe_optimizer("SPLIT", OptimizerSection(**section), torch.device("cpu")) == words


def test_a_wait_for_a_gpu_is_told_and_a_cpu_has_none() -> None:
    gpu = torch.device("cuda")
    told = describe_host_wait(DeepSpeedSteps.host_wait, gpu)
    assert told == "the host waits for the GPU before each update: DeepSpeed asks it for the norm of the gradient"
    assert describe_host_wait(DeepSpeedSteps.host_wait, torch.device("cpu")) is None
    assert describe_host_wait(None, gpu) is None


@pytest.mark.parametrize(
    ("step", "ancestor", "changes", "said"),
    [
        (0, None, (), True),
        (8, None, (), False),  # a resume, or a later phase of the same command
        (8, "runs/other", (), True),
        (8, None, ("engine.precision: 'bf16' -> 'fp32'",), False),
        (8, None, ("phases.continuation.steps: 4 -> 400",), True),
    ],
)
def test_the_numbers_of_a_plan_are_told_where_it_begins_or_changes(
    monkeypatch: pytest.MonkeyPatch, step: int, ancestor: str | None, changes: tuple[str, ...], said: bool
) -> None:
    lines = [PreflightLine("epochs", "0.2")]
    monkeypatch.setattr(describe, "describe_preflight", lambda *_: lines)
    start: Any = SimpleNamespace(point=SimpleNamespace(step=step, ancestor=ancestor), rows_per_step=4)
    settings: Any = SimpleNamespace(config=None, num_parameters=1)
    folder: Any = SimpleNamespace(changes=changes)
    loader: Any = SimpleNamespace(prepared=None)
    found = describe.find_preflight_lines(start, settings, folder, loader)
    assert found == (lines if said else [])


def test_the_first_start_says_that_it_waits_for_the_compiler_and_later_ones_do_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    config = tiny.load(tmp_path)
    world: Any = SimpleNamespace(device=torch.device("cpu"), size=1, cpu_share=CpuShare(2, frozenset(), "not bound"))
    layout = SimpleNamespace(micro_batch=2, accumulation=1, sequence_length=16)
    loader: Any = SimpleNamespace(layout=layout)
    settings: Any = SimpleNamespace(config=config, computing=ComputeOptions(), precision="bf16")
    task = name_compiled_code(settings, loader, world)
    assert describe_compiled_code(task).startswith("made before the first step, once, in about half a minute on a CPU")
    note_compiled(task)
    assert describe_compiled_code(task) == f"loaded from {tmp_path}"
    layout.micro_batch = 4
    assert describe_compiled_code(name_compiled_code(settings, loader, world)).startswith("made before")
