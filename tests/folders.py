"""Run folders and Hugging Face folders made by hand, without training."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from smoltrain import checkpoint, data, files, huggingface, model, runfolder
from smoltrain.checkpoint.manifest import Record
from smoltrain.data.tokenizer import Tokenizer
from smoltrain.model import LanguageModel
from smoltrain.schema import Config, ModelSection, TransformersSection
from tests import tiny

SEPARATOR = "<|endoftext|>"


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread, an export's fresh process too: two that wait for busy cores take ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def lively(section: ModelSection | TransformersSection, seed: int = 0) -> LanguageModel:
    """A model whose every weight matters: none of its biases is zero, no norm is one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        built = model.build(section)
        with torch.no_grad():
            for p in built.parameters():
                p.add_(0.15 * torch.randn(p.shape))
    return built.eval()


def run(folder: Path, *overrides: str, steps: tuple[int, ...] = (8, 12)) -> Path:
    """The folder of a tiny run with checkpoints that look trained."""
    return run_of(tiny.load(folder, *overrides), steps)


def run_of(config: Config, steps: tuple[int, ...] = (8, 12)) -> Path:
    """The folder of a run, its checkpoints in bf16 and without DeepSpeed's shards."""
    data.prepare(config)
    entered = runfolder.enter(config, 1, 0)
    assert entered.identity
    for step in steps:
        at = checkpoint.folder_of(entered.path / "checkpoints", step)
        at.mkdir(parents=True)
        weights = {n: p.detach().bfloat16() for n, p in lively(config.model, step).named_parameters()}
        save_file(weights, at / "model.safetensors")
        path = at / "model.safetensors"
        record = Record(bytes=path.stat().st_size, sha256=files.sha256(path))
        manifest = checkpoint.Manifest(
            checkpoint.FORMAT, step, "main", 1, 2, "bf16", {}, 0, entered.wandb_id, entered.identity, None, 8,
            {"model.safetensors": record},
        )  # fmt: skip
        checkpoint.write_manifest(at, manifest)
    lines = [
        {
            "step": n,
            "train/loss_nats_per_token": 6 - n / 10,
            "data/tokens": 64 * n,
            "validation/loss_nats_per_token": 7.0,
        }
        for n in range(1, 13)
    ]
    (entered.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return entered.path


def tokenizer() -> Tokenizer:
    """A byte-level BPE of about 300 ids."""
    return Tokenizer.train_bpe(("the king spoke to the queen of Naples " * 4,), 300, SEPARATOR)


def hub(folder: Path, section: ModelSection, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> LanguageModel:
    """Write a whole Hugging Face folder; returns our model with its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    built = lively(section, seed)
    ours = {name: p.detach().to(dtype) for name, p in built.named_parameters()}
    built.load_state_dict({name: x.float() for name, x in ours.items()}, strict=False)
    save_file(huggingface.their_tensors(section, ours), folder / "model.safetensors", metadata={"format": "pt"})
    files.write_json(folder / "config.json", huggingface.config_of(section))
    shutil.copy(huggingface.CODE, folder)
    tokenizer().save(folder)
    return built
