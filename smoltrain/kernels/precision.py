"""Precisions by name, and which of them a device computes in."""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PROCESSOR = Path("/proc/cpuinfo")


class FastestPrecision(NamedTuple):
    """In which precision a processor multiplies matrices fastest, and how that is known."""

    name: str
    reason: str


def find_fastest_precision() -> FastestPrecision:
    """That of this machine's CPU."""
    return _find_fastest_precision(PROCESSOR)


@cache
def _find_fastest_precision(file: Path) -> FastestPrecision:
    """By what Linux says of the processor: a rule, since a timing might choose otherwise after a resume."""
    words = set(file.read_text(encoding="utf-8").split()) if file.is_file() else set()
    if "amx_bf16" in words:
        return FastestPrecision("bf16", "this processor has AMX")
    if "avx512_bf16" in words and "AuthenticAMD" in words:
        return FastestPrecision("bf16", "this processor multiplies it at twice the speed of fp32")
    # Intel's AVX512-bf16 without AMX multiplies at half the speed of fp32, without either it is emulated.
    return FastestPrecision("fp32", "this processor is not known to multiply bf16 faster")


def choose_precision(requested: str, device: torch.device) -> tuple[str, str]:
    """(precision, reason) on this device; `requested` is engine.precision."""
    if device.type == "cpu":
        if requested == "fp16":
            return "bf16", "fp16 was asked for, but DeepSpeed cannot run it on a CPU"
        if requested == "auto":
            name, reason = find_fastest_precision()
            return name, f"auto, {reason}"
        return requested, "as the recipe asks"
    if requested != "auto":
        return requested, "as the recipe asks"
    # Emulated bf16 would be slower than fp16, which every GPU that DeepSpeed supports computes.
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", "auto, this GPU computes it"
    return "fp16", "auto, this GPU has no bf16"
