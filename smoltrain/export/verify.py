"""Whether an export is the model: the same logits and the same text from `transformers` alone, in a fresh process.

That process runs reload.py, which cannot import smoltrain. Legend: T tokens, V vocabulary.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from smoltrain.config.schema import GenerationSection
from smoltrain.data.tokens.load_prepared import load_prepared_data
from smoltrain.errors import TrainingStopped, UserError
from smoltrain.inference.device import move_to_best_device
from smoltrain.inference.load import LoadedModel
from smoltrain.model.hf_config import MODELING_FILE

RELOAD_SCRIPT = Path(__file__).parent / "reload.py"
NUM_CASES, CASE_TOKENS, LONG_CASE_TOKENS = 16, 32, 256
NUM_GREEDY, GREEDY_TOKENS = 4, 32
TOLERANCE = 1e-4  # of a logit, in fp32: the order of additions differs, nothing else may
TEXTS = (
    "The",
    "Once upon a time, there was",
    "In 1984 the price rose by 12.5 %",
    "def main():\n    return",
    " é 日本 🙂",
)


@dataclass(frozen=True)
class VerificationPrompt:
    """A prompt. `text` is what the tokenizer must turn into the ids; `new_tokens` are to be written behind it."""

    ids: list[int]
    text: str | None = None
    new_tokens: int = 0


@dataclass(frozen=True)
class ExportComparison:
    """What transformers loaded: its class, its parameters, the largest difference of a logit (within TOLERANCE)."""

    class_name: str
    num_parameters: int
    max_difference: float
    device_reason: str | None = None  # where both computed, if this machine left a choice


def verify_export(loaded: LoadedModel, folder: Path) -> ExportComparison:
    """Reload the export in `folder` and compare with the model it was made of, which moves to the GPU if there is one.

    Errors: TrainingStopped naming the first thing that differs.
    """
    device_reason = move_to_best_device(loaded.model, num_processes=2).reason  # this one and the fresh one
    prompts = make_verification_prompts(loaded)
    with tempfile.TemporaryDirectory() as scratch:
        answers = _reload_in_fresh_process(loaded, folder, prompts, Path(scratch))
        if answers["not_loaded"]:
            raise TrainingStopped(f"transformers could not place tensors of the export: {answers['not_loaded'][:3]}")
        differences = []
        with safe_open(Path(scratch) / "logits.safetensors", framework="pt") as logits:
            for i, prompt in enumerate(prompts):
                differences.append(_max_logit_difference(loaded, prompt, logits.get_tensor(str(i))))
    if max(differences) > TOLERANCE:
        raise TrainingStopped(
            f"the export is not the model: logits differ by up to {max(differences):.2g} on {len(prompts)} prompts, "
            f"at most {TOLERANCE:g} is rounding"
        )
    for prompt, answer in zip(prompts, answers["cases"], strict=True):
        _check_ids_and_text(loaded, prompt, answer)
    return ExportComparison(answers["class"], answers["parameters"], max(differences), device_reason)


def make_verification_prompts(loaded: LoadedModel) -> list[VerificationPrompt]:
    """NUM_CASES prompts: the run's own and some texts, pieces of its validation data, random ids for what is missing.

    The last one is long, to reach later positions.
    """
    room = loaded.model.section.max_position_embeddings
    limit = max(1, min(CASE_TOKENS, room // 2))
    prompts = _make_text_prompts(loaded, limit, room)
    held_out = _read_held_out_ids(loaded)
    stride = max(1, len(held_out) // NUM_CASES)
    for start in range(0, len(held_out), stride):
        if len(prompts) < NUM_CASES - 1:
            prompts.append(VerificationPrompt(held_out[start : start + limit]))
    generator = torch.Generator().manual_seed(loaded.seed)
    while len(prompts) < NUM_CASES:
        is_last = len(prompts) == NUM_CASES - 1
        length = min(room, LONG_CASE_TOKENS) if is_last else limit
        ids = torch.randint(loaded.tokenizer.num_ids, (length,), generator=generator)
        prompts.append(VerificationPrompt(ids.tolist()))
    return prompts


def _make_text_prompts(loaded: LoadedModel, limit: int, room: int) -> list[VerificationPrompt]:
    """The recipe's prompts and TEXTS, cut to `limit` tokens; behind the first NUM_GREEDY text is to be written."""
    recipe_prompts = loaded.config.sample.prompts[:NUM_GREEDY] if loaded.config else ()
    prompts: list[VerificationPrompt] = []
    for text in dict.fromkeys([*recipe_prompts, *TEXTS]):  # each once
        all_ids = loaded.tokenizer.encode(text)
        ids = all_ids[:limit] or [loaded.tokenizer.separator_id]
        new_tokens = min(GREEDY_TOKENS, room - len(ids)) if len(prompts) < NUM_GREEDY else 0
        prompts.append(VerificationPrompt(ids, text if ids == all_ids else None, new_tokens))
    return prompts


def _read_held_out_ids(loaded: LoadedModel) -> list[int]:
    """The first held-out tokens of a run; none if its data, or the cache of them, are not here or not whole."""
    if loaded.config is None:
        return []
    try:
        tokens = load_prepared_data(loaded.config).validation[0]
    except UserError:  # of a run that was copied without its data.cache, say: random ids take their place
        return []
    return tokens.read_rows(np.zeros(1, int), min(len(tokens), NUM_CASES * LONG_CASE_TOKENS))[0].tolist()


def _reload_in_fresh_process(
    loaded: LoadedModel, folder: Path, prompts: list[VerificationPrompt], scratch: Path
) -> dict[str, Any]:
    """The answers of reload.py, in a process that has transformers and cannot import smoltrain."""
    cases_file = scratch / "cases.json"
    device = loaded.model.device  # the same for both: other kernels add in another order
    cases = {
        "device": str(device),
        "trust_remote_code": (folder / MODELING_FILE.name).is_file(),
        "cases": [asdict(prompt) for prompt in prompts],
        "end_ids": loaded.stop_ids,
        "banned_ids": loaded.banned_ids,
    }
    cases_file.write_text(json.dumps(cases), encoding="utf-8")
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch / "modules"),
        "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }  # fmt: skip
    if device.type == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-I", str(RELOAD_SCRIPT), str(folder.resolve()), str(cases_file), str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise TrainingStopped(f"transformers cannot load the export: {lines[-1]}")
    return json.loads((scratch / "answers.json").read_text(encoding="utf-8"))


@torch.no_grad()
def _max_logit_difference(loaded: LoadedModel, prompt: VerificationPrompt, theirs_TV: Tensor) -> float:
    """Largest distance between two logits of a prompt; inf where one is no number, or if there are not as many."""
    ours_TV = loaded.model(torch.tensor([prompt.ids], device=loaded.model.device))[0].cpu()
    if ours_TV.shape != theirs_TV.shape:
        return math.inf
    return float((ours_TV - theirs_TV).abs().nan_to_num(nan=math.inf).max())


def _check_ids_and_text(loaded: LoadedModel, prompt: VerificationPrompt, answer: dict[str, Any]) -> None:
    """Errors: TrainingStopped if the tokenizer gives other ids, or greedy generation another text."""
    if prompt.text is not None and answer["ids"] != prompt.ids:
        raise TrainingStopped(f"the export's tokenizer gives other ids for {prompt.text!r}")
    if not prompt.new_tokens:
        return
    new_ids = list(loaded.generate_ids(prompt.ids, GenerationSection(max_tokens=prompt.new_tokens), greedy=True))
    text = loaded.tokenizer.decode(prompt.ids + new_ids)
    if (answer["new"], answer["text"]) != (new_ids, text):
        raise TrainingStopped(f"the export goes on with another text: {answer['text']!r}, not {text!r}")
