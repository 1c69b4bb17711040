"""Load an export with `transformers` alone and say what it answers: python -I reload.py FOLDER CASES.json ANSWERS

CASES.json    {"device", "trust_remote_code", "end_ids", "banned_ids",
               "cases": [{"text" or null, "ids", "new_tokens"}, ...]}
ANSWERS       a folder, which receives answers.json (class, parameters, and per case the ids of the text, the new ids,
              and all of it as text) and logits.safetensors (fp32 [T, V] per case, named by its number)

verify.py runs this in a fresh process and compares. All numbers are computed in fp32.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.modules["smoltrain"] = None  # pyright: ignore[reportArgumentType] # from here on importing it is an error

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig  # noqa: E402


def answer_prompts(folder: str, cases_file: str, answers: str) -> None:
    """Answer every case of the file."""
    question = json.loads(Path(cases_file).read_text(encoding="utf-8"))
    end_ids = question["end_ids"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = {"trust_remote_code": question["trust_remote_code"], "output_loading_info": True}
    options["torch_dtype" if transformers.__version__.startswith("4.") else "dtype"] = torch.float32
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    model, report = loaded
    model.to(question["device"]).eval()
    # In place of the folder's own settings, which may penalise or draw.
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=end_ids[0],
        eos_token_id=end_ids,
        pad_token_id=end_ids[0],
        suppress_tokens=question["banned_ids"] or None,
    )
    logits = {}
    case_answers = []
    for i, case in enumerate(question["cases"]):
        with torch.no_grad():
            prompt = torch.tensor([case["ids"]], device=model.device)
            logits[str(i)] = model(prompt, use_cache=False).logits[0].cpu().contiguous()
        case_answers.append(answer_prompt(model, tokenizer, case, end_ids))
    save_file(logits, Path(answers) / "logits.safetensors")
    answer = {
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),  # a tied one once
        "not_loaded": sorted(str(key) for keys in report.values() for key in keys),
        "cases": case_answers,
    }
    (Path(answers) / "answers.json").write_text(json.dumps(answer), encoding="utf-8")


def answer_prompt(model: Any, tokenizer: Any, case: dict[str, Any], end_ids: list[int]) -> dict[str, Any]:
    """The ids of the case's text, and what the model writes next, greedily, up to the end of the text."""
    ids = None
    if case["text"] is not None:  # special tokens spelled out in a text are text
        ids = tokenizer(case["text"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if not case["new_tokens"]:
        return {"ids": ids, "new": [], "text": ""}
    prompt = torch.tensor([case["ids"]], device=model.device)
    written = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=case["new_tokens"])[0]
    new = written[len(case["ids"]) :].tolist()
    end = next((i for i, token in enumerate(new) if token in end_ids), len(new))
    new = new[:end]
    return {"ids": ids, "new": new, "text": tokenizer.decode(case["ids"] + new, skip_special_tokens=True)}


if __name__ == "__main__":
    answer_prompts(*sys.argv[1:])
