"""What a training step did."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from smoltrain.engine.layer_gradients import LayerGradient
from smoltrain.engine.layer_weights import LayerWeight


@dataclass(frozen=True)
class StepResult:
    """What one training step did; the same on every rank, but for the times and the memory among its metrics."""

    digests: np.ndarray  # uint64, of all rows that were consumed: more than one step's where updates were skipped
    stopped: bool = False  # a rank is to stop: nothing was updated, there are no metrics
    waited_for_data: bool = False  # when it was stopped
    metrics: dict[str, Any] = field(default_factory=dict)
    layer_gradients: dict[str, LayerGradient] = field(default_factory=dict)
    layer_weights: dict[str, LayerWeight] = field(default_factory=dict)
    num_skipped: int = 0  # updates before this one, or before the stop
