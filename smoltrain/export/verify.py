"""Whether an export is the model: the same logits and the same text from `transformers` alone, in a fresh process.

Legend: T tokens, V vocabulary.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from smoltrain.config.schema import GenerationSection
from smoltrain.data.tokens.prepare import load_prepared_data
from smoltrain.errors import TrainingStopped
from smoltrain.inference.load import LoadedModel
from smoltrain.model.hf_format import MODELING_FILE

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
    """What transformers made of the folder: equal within TOLERANCE."""

    class_name: str
    num_parameters: int
    max_difference: float


def verify_export(loaded: LoadedModel, folder: Path) -> ExportComparison:
    """Reload the export in `folder` and compare with the model it was made of.

    Errors: TrainingStopped naming the first thing that differs.
    """
    asked = make_verification_prompts(loaded)
    with tempfile.TemporaryDirectory() as scratch:
        answers = _reload_in_fresh_process(loaded, folder, asked, Path(scratch))
        if answers["not_loaded"]:
            raise TrainingStopped(f"transformers could not place tensors of the export: {answers['not_loaded'][:3]}")
        differences = [0.0]
        with safe_open(Path(scratch) / "logits.safetensors", framework="pt") as logits:
            for i, case in enumerate(asked):
                differences.append(_max_logit_difference(loaded, case, logits.get_tensor(str(i))))
    worst = max(differences)
    if worst > TOLERANCE:
        raise TrainingStopped(
            f"the export is not the model: logits differ by up to {worst:.2g} on {len(asked)} prompts, "
            f"at most {TOLERANCE:g} is rounding; it was deleted"
        )
    for case, answer in zip(asked, answers["cases"], strict=True):
        _check_ids_and_text(loaded, case, answer)
    return ExportComparison(answers["class"], answers["parameters"], worst)


def make_verification_prompts(loaded: LoadedModel) -> list[VerificationPrompt]:
    """The run's own prompts, some texts, pieces of its validation data, and ids at random for what is missing."""
    tokenizer, room = loaded.tokenizer, loaded.model.section.max_position_embeddings
    limit = max(1, min(CASE_TOKENS, room // 2))
    prompts = loaded.config.sample.prompts if loaded.config else ()
    found: list[VerificationPrompt] = []
    for text in dict.fromkeys([*prompts[:NUM_GREEDY], *TEXTS]):
        ids = tokenizer.encode(text)
        new = min(GREEDY_TOKENS, room - min(len(ids), limit)) if len(found) < NUM_GREEDY else 0
        whole = 0 < len(ids) <= limit
        found.append(VerificationPrompt(ids[:limit] or [tokenizer.separator_id], text if whole else None, new))
    held_out = _read_held_out_ids(loaded)
    step = max(1, len(held_out) // NUM_CASES)
    pieces = [held_out[at : at + limit] for at in range(0, len(held_out), step)] if held_out else []
    found += [VerificationPrompt(ids) for ids in pieces[: NUM_CASES - 1 - len(found)]]
    draw = torch.Generator().manual_seed(loaded.seed)
    while len(found) < NUM_CASES:  # the last one is long, to reach later positions
        size = min(room, LONG_CASE_TOKENS) if len(found) == NUM_CASES - 1 else limit
        found.append(VerificationPrompt(torch.randint(tokenizer.num_ids, (size,), generator=draw).tolist()))
    return found


def _read_held_out_ids(loaded: LoadedModel) -> list[int]:
    """The first held-out tokens of a run, wherever its folder lies now; none if its data were deleted."""
    if loaded.config is None or not (loaded.folder / "data").is_dir():
        return []
    run = loaded.config.run.model_copy(update={"folder": loaded.folder.parent, "name": loaded.folder.name})
    tokens = load_prepared_data(loaded.config.model_copy(update={"run": run})).validation[0]
    return tokens.read_rows(np.zeros(1, int), min(len(tokens), NUM_CASES * LONG_CASE_TOKENS))[0].tolist()


def _reload_in_fresh_process(loaded: LoadedModel, folder: Path, asked: list[VerificationPrompt], scratch: Path) -> dict:
    """What the script answers in a process that has transformers and cannot import smoltrain."""
    question = {
        "trust_remote_code": (folder / MODELING_FILE.name).is_file(),
        "cases": [asdict(case) for case in asked],
        "end_ids": loaded.end_ids,
        "banned_ids": loaded.banned_ids,
    }
    (scratch / "cases.json").write_text(json.dumps(question), encoding="utf-8")
    own = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch / "modules"), "CUDA_VISIBLE_DEVICES": ""}
    own |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    words = [sys.executable, "-I", str(RELOAD_SCRIPT), str(folder.resolve()), str(scratch / "cases.json"), str(scratch)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ | own)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise TrainingStopped(f"transformers cannot load the export, which was deleted: {said[-1]}")
    return json.loads((scratch / "answers.json").read_text(encoding="utf-8"))


@torch.no_grad()
def _max_logit_difference(loaded: LoadedModel, case: VerificationPrompt, theirs_TV: torch.Tensor) -> float:
    """Largest distance between two logits of a case; inf where one is no number, or if there are not as many."""
    ours_TV = loaded.model(torch.tensor([case.ids]))[0]
    if ours_TV.shape != theirs_TV.shape:
        return math.inf
    return float((ours_TV - theirs_TV).abs().nan_to_num(nan=math.inf).max())


def _check_ids_and_text(loaded: LoadedModel, case: VerificationPrompt, answer: dict) -> None:
    """Errors: TrainingStopped if the tokenizer gives other ids, or greedy generation another text."""
    tokenizer = loaded.tokenizer
    if case.text is not None and answer["ids"] != case.ids:
        raise TrainingStopped(f"the export's tokenizer gives other ids for {case.text!r}; it was deleted")
    if not case.new_tokens:
        return
    ids = list(loaded.generate(case.ids, GenerationSection(max_tokens=case.new_tokens), greedy=True))
    if (answer["new"], answer["text"]) != (ids, tokenizer.decode(case.ids + ids)):
        saw, want = answer["text"], tokenizer.decode(case.ids + ids)
        raise TrainingStopped(f"the export goes on with another text: {saw!r}, not {want!r}; it was deleted")
