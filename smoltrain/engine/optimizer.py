"""TODO: moved out of engine.py."""

from typing import Any

import torch


def weight_decay_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Two parameter groups: matrices (embeddings too) decay, vectors (norms, biases) never do."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "decays": True},
        {"params": [p for p in parameters if p.dim() < 2], "decays": False},
    ]
