"""TODO: moved out of deepspeed_json.py."""

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_precision(requested: str, device: torch.device) -> tuple[str, str]:
    """(precision, reason). DeepSpeed refuses fp16 on the CPU; bf16 then stands in, and the reason says so."""
    if device.type == "cpu":
        if requested == "fp16":
            return "bf16", "fp16 was asked for, but DeepSpeed cannot run it on a CPU"
        return ("bf16", "auto, on a CPU") if requested == "auto" else (requested, "as the recipe asks")
    if requested == "auto":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "auto, this GPU computes it") if native else ("fp16", "auto, this GPU has no bf16")
    return requested, "as the recipe asks"
