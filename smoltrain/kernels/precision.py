"""Precisions by name, and which of them a device computes in."""

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_precision(requested: str, device: torch.device) -> tuple[str, str]:
    """(precision, reason) on this device; `requested` is engine.precision."""
    if device.type == "cpu":
        if requested == "fp16":
            return "bf16", "fp16 was asked for, but DeepSpeed cannot run it on a CPU"
        if requested == "auto":
            return "bf16", "auto, on a CPU"
        return requested, "as the recipe asks"
    if requested != "auto":
        return requested, "as the recipe asks"
    # Emulated bf16 would be slower than fp16, which every GPU that DeepSpeed supports computes.
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", "auto, this GPU computes it"
    return "fp16", "auto, this GPU has no bf16"
