"""The loop that one would write oneself: a model of transformers, autocast, cross-entropy, AdamW, eager or compiled."""

import sys

import torch
from peer import ACCUMULATION, MICRO_BATCH, STEPS, TASK, exit_at_once, load_task_rows, write_step_line
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def train_plain_loop() -> None:
    """Train on the task's rows."""
    device, dtype = torch.device(TASK["device"]), DTYPES[TASK["precision"]]
    torch.manual_seed(TASK["seed"])
    config = AutoConfig.for_model(**TASK["model"], use_cache=False)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(device)
    model.train()
    if TASK["recompute"]:
        model.activation_checkpointing_enable()
    forward = torch.compile(model) if "--compile" in sys.argv else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=TASK["lr"], betas=(TASK["beta1"], TASK["beta2"]), eps=TASK["eps"],
        weight_decay=TASK["weight_decay"],
    )  # fmt: skip
    scaler = torch.amp.GradScaler(device.type, enabled=TASK["precision"] == "fp16")
    batches = iter(load_task_rows().split(MICRO_BATCH))
    for step in range(1, STEPS + 1):
        total = 0.0
        for _ in range(ACCUMULATION):
            rows_BS = next(batches).to(device)
            with torch.autocast(device.type, dtype, enabled=TASK["precision"] != "fp32"):
                logits_BTV = forward(input_ids=rows_BS[:, :-1].contiguous()).logits
                loss = F.cross_entropy(logits_BTV.flatten(0, 1), rows_BS[:, 1:].flatten()) / ACCUMULATION
            scaler.scale(loss).backward()
            total += loss.item()
        scaler.unscale_(optimizer)
        if TASK["gradient_clipping"]:
            torch.nn.utils.clip_grad_norm_(model.parameters(), TASK["gradient_clipping"])
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        write_step_line(step, total, model)


train_plain_loop()
exit_at_once()
