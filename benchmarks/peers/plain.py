"""The loop that one would write oneself: a model of transformers, autocast, cross-entropy, AdamW, eager or compiled."""

import sys
from collections.abc import Callable

import torch
from hf_model import build_hf_model
from peer import (
    ACCUMULATION,
    LRS,
    MICRO_BATCH,
    STEPS,
    TASK,
    VALIDATE_EVERY,
    exit_at_once,
    find_validation_batch,
    load_task_rows,
    load_validation_rows,
    write_step_line,
    write_validation_line,
)
from torch.nn import functional as F

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def train_plain_loop() -> None:
    """Train on the task's rows."""
    device, dtype = torch.device(TASK["device"]), DTYPES[TASK["precision"]]
    model = build_hf_model().to(device)
    model.train()
    if TASK["recompute"]:
        model.activation_checkpointing_enable()
    forward = torch.compile(model) if "--compile" in sys.argv else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=TASK["lr"], betas=(TASK["beta1"], TASK["beta2"]), eps=TASK["eps"],
        weight_decay=TASK["weight_decay"], fused=device.type == "cuda",
    )  # fmt: skip
    scaler = torch.amp.GradScaler(device.type, enabled=TASK["precision"] == "fp16")
    batches = iter(load_task_rows().split(MICRO_BATCH))
    for step in range(1, STEPS + 1):
        total = torch.zeros((), device=device)
        for group in optimizer.param_groups:
            group["lr"] = LRS[step - 1]
        for _ in range(ACCUMULATION):
            rows_BS = next(batches).to(device)
            with torch.autocast(device.type, dtype, enabled=TASK["precision"] != "fp32"):
                logits_BTV = forward(input_ids=rows_BS[:, :-1].contiguous()).logits
                loss = F.cross_entropy(logits_BTV.flatten(0, 1), rows_BS[:, 1:].flatten()) / ACCUMULATION
            scaler.scale(loss).backward()
            total += loss.detach()
        scaler.unscale_(optimizer)
        if TASK["gradient_clipping"]:
            torch.nn.utils.clip_grad_norm_(model.parameters(), TASK["gradient_clipping"])
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        write_step_line(step, total.item(), model)  # which waits for the device, once a step
        if VALIDATE_EVERY and step % VALIDATE_EVERY == 0:
            model.eval()
            write_validation_line(step, compute_validation_loss(forward, device, dtype))
            model.train()


@torch.no_grad()
def compute_validation_loss(forward: Callable, device: torch.device, dtype: torch.dtype) -> float:
    """Mean over all tokens of the validation rows, in nats."""
    rows_NS = load_validation_rows()
    total = 0.0
    for cpu_rows_BS in rows_NS.split(find_validation_batch(len(rows_NS))):
        rows_BS = cpu_rows_BS.to(device)
        with torch.autocast(device.type, dtype, enabled=TASK["precision"] != "fp32"):
            logits_BTV = forward(input_ids=rows_BS[:, :-1].contiguous()).logits
        total += F.cross_entropy(logits_BTV.flatten(0, 1).float(), rows_BS[:, 1:].flatten(), reduction="sum").item()
    return total / rows_NS[:, 1:].numel()


train_plain_loop()
exit_at_once()
