"""Run folders and Hugging Face folders made by hand, without training."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, processors

from smoltrain import files
from smoltrain.checkpoint.manifest import (
    MANIFEST_FORMAT,
    FileRecord,
    Manifest,
    list_checkpoint_steps,
    read_manifest,
    step_folder,
    write_manifest,
)
from smoltrain.config.config_file import CONFIG_DIGEST_PREFIX, CONFIG_FILE, config_digest_line
from smoltrain.config.older_keys import NEWER_KEYS, RENAMED_KEYS
from smoltrain.config.schema import AnyModelSection, Config, ModelSection
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.model.build import build_model
from smoltrain.model.hf_config import MODELING_FILE, make_hf_config
from smoltrain.model.hf_format import convert_to_hf_tensors
from smoltrain.model.interface import LanguageModel
from tests import tiny
from tests.tiny import enter_run_folder

SEPARATOR = "<|endoftext|>"


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread, an export's fresh process too: two that wait for busy cores take ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def lively(section: AnyModelSection, seed: int = 0) -> LanguageModel:
    """A model whose every weight matters: none of its biases is zero, no norm is one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        built = build_model(section)
        with torch.no_grad():
            for p in built.parameters():
                p.add_(0.15 * torch.randn(p.shape))
    return built.eval()


STATES = (
    "rank-00000.pt",
    "deepspeed/mp_rank_00_model_states.pt",
    "deepspeed/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
)


def run(folder: Path, *overrides: str, steps: tuple[int, ...] = (8, 12), states: bool = False) -> Path:
    """The folder of a tiny run with checkpoints that look trained; `states`: and as if one could go on from them."""
    return run_of(tiny.load(folder, *overrides), steps, states=states)


def run_of(config: Config, steps: tuple[int, ...] = (8, 12), *, states: bool = False) -> Path:
    """The folder of a run, its checkpoints in bf16; what stands for states of one rank holds none."""
    prepare_run_data(config)
    entered = enter_run_folder(config, 1, 0)
    assert entered.identity
    for step in steps:
        at = step_folder(entered.path / "checkpoints", step)
        at.mkdir(parents=True)
        weights = {n: p.detach().bfloat16() for n, p in lively(config.model, step).named_parameters()}
        save_file(weights, at / "model.safetensors")
        names = ("model.safetensors", *(STATES if states else ()))
        for name in names[1:]:
            (at / name).parent.mkdir(exist_ok=True)
            (at / name).write_text(f"{name} of step {step}")
        records = {n: FileRecord(bytes=(at / n).stat().st_size, sha256=files.file_sha256(at / n)) for n in names}
        manifest = Manifest(
            MANIFEST_FORMAT, step, "main", 1, 2, "bf16", {}, 0, entered.wandb_id, entered.identity, None, 8,
            records,
        )  # fmt: skip
        write_manifest(at, manifest)
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


def evaluate(run: Path, step: int, loss: float) -> None:
    """Have the checkpoint of a step say this validation loss."""
    checkpoint = step_folder(run / "checkpoints", step)
    manifest = read_manifest(checkpoint)
    assert isinstance(manifest, Manifest)
    write_manifest(checkpoint, replace(manifest, validation_loss=loss))


def make_older(run: Path) -> None:
    """A run's folder as the version wrote it that had old names for keys, and not yet the newer ones; sealed anew."""
    path = run / CONFIG_FILE
    kept: list[str] = []
    section = ""
    for line in path.read_text(encoding="utf-8").partition(CONFIG_DIGEST_PREFIX)[0].splitlines():
        name = line.strip().partition(":")[0]
        section = section if line.startswith((" ", "-")) else name
        old_names = {new: old for old, new in RENAMED_KEYS.items()}
        key = f"{section}.{name}"
        if key in old_names:
            kept.append(line.replace(name, old_names[key].rpartition(".")[2], 1))
        elif key not in NEWER_KEYS:
            kept.append(line)
    text = "\n".join(kept) + "\n"
    path.write_text(text + config_digest_line(text), encoding="utf-8")
    for step in list_checkpoint_steps(run / "checkpoints"):
        checkpoint = step_folder(run / "checkpoints", step)
        manifest = read_manifest(checkpoint)
        assert isinstance(manifest, Manifest)
        values = manifest.identity["values"]
        for old, new in RENAMED_KEYS.items():
            values[old] = values[new]
        for key in NEWER_KEYS:
            values.pop(key, None)
        write_manifest(checkpoint, manifest)


def tokenizer() -> Tokenizer:
    """A byte-level BPE of about 300 ids."""
    return Tokenizer.train_bpe(("the king spoke to the queen of Naples " * 4,), 300, SEPARATOR)


def hub(folder: Path, section: ModelSection, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> LanguageModel:
    """Write a whole Hugging Face folder; returns our model with its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    built = lively(section, seed)
    ours = {name: p.detach().to(dtype) for name, p in built.named_parameters()}
    built.load_state_dict({name: x.float() for name, x in ours.items()}, strict=False)
    save_file(convert_to_hf_tensors(section, ours), folder / "model.safetensors", metadata={"format": "pt"})
    files.write_json_file(folder / "config.json", make_hf_config(section))
    shutil.copy(MODELING_FILE, folder)
    tokenizer().save(folder)
    return built


CHAT_SHAPE = ModelSection(
    vocab_size=330,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    max_position_embeddings=64,
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|user|>{{ m['role'] }}: {{ m['content'] }}<|turn|>\n{% endfor %}"
)
CHAT_GENERATION = {"do_sample": True, "temperature": 0.6, "repetition_penalty": 1.1, "min_p": 0.05}


def chat(folder: Path, *, template_file: bool = False, **about: Any) -> dict[str, int]:
    """A Hugging Face folder of a model that chats: it has what authors put beside weights. Returns its special ids."""
    hub(folder, CHAT_SHAPE)
    (folder / MODELING_FILE.name).unlink()
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    words = ("<|user|>", "<|turn|>", "<|begin|>", "<|tool|>")
    inner.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in words])
    ids = {word: int(inner.token_to_id(word) or 0) for word in (SEPARATOR, *words)}
    begin = ("<|begin|>", ids["<|begin|>"])
    inner.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[begin])
    inner.save(str(folder / "tokenizer.json"))
    said: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": SEPARATOR,
        "pad_token": "<|turn|>",
        "additional_special_tokens": ["<|user|>", "<|turn|>", "<|tool|>"],
        "padding_side": "left",
        "truncation_side": "left",
        "add_bos_token": True,
        "name_or_path": "/home/somebody/chat",
        "chat_template": CHAT_TEMPLATE,
    }
    if template_file:
        del said["chat_template"]
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("TOOLS " + CHAT_TEMPLATE)
    (folder / "tokenizer_config.json").write_text(json.dumps(said | about))
    ends = {"eos_token_id": [ids[SEPARATOR], ids["<|turn|>"]], "bos_token_id": ids["<|begin|>"]}
    (folder / "generation_config.json").write_text(
        json.dumps(CHAT_GENERATION | ends | {"transformers_version": "4.40"})
    )
    return ids


def list_closed_files(folder: Path) -> list[str]:
    """The files of a folder that have other permissions than a new one gets."""
    new = folder / "new"
    new.touch()
    usual = new.stat().st_mode
    new.unlink()
    return [path.name for path in folder.rglob("*") if path.is_file() and path.stat().st_mode != usual]
