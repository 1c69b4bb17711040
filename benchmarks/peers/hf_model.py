"""The model of transformers that a task asks for, as the peers built on transformers share it."""

from typing import Any

import torch
from peer import TASK
from transformers import AutoConfig, AutoModelForCausalLM


def build_hf_model() -> Any:
    """With weights as transformers draws them, or with those of a folder, if the task names one."""
    torch.manual_seed(TASK["seed"])
    if "weights" in TASK:
        return AutoModelForCausalLM.from_pretrained(TASK["weights"], attn_implementation="sdpa", dtype=torch.float32)
    config = AutoConfig.for_model(**TASK["model"], use_cache=False)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
