"""All that is open while a run trains: rows, model, engine, records, checkpoints. open_session.py opens it."""

import functools
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from smoltrain.checkpoint.saver import CheckpointSaver
from smoltrain.config.schema import Config
from smoltrain.data.rows.loader import Loader
from smoltrain.data.tokenizers.companions import read_generation_config
from smoltrain.distributed.stop import StopFlag
from smoltrain.distributed.world import World
from smoltrain.engine.engine import Engine
from smoltrain.inference.load import stop_token_ids
from smoltrain.model.interface import ComputeOptions
from smoltrain.run.row_ledger import RowLedger
from smoltrain.run.run_folder import RunFolder
from smoltrain.run.track import Tracker
from smoltrain.schedule import Plan
from smoltrain.training.callbacks import StepCallback
from smoltrain.training.mfu import MfuMeter
from smoltrain.training.spikes import SpikeGuard
from smoltrain.training.start import Start
from smoltrain.training.step_result import StepResult
from smoltrain.training.watchdog import Watchdog

if TYPE_CHECKING:  # lm_eval, which takes seconds
    from smoltrain.evaluation.harness import HarnessTasks

RECENT_STEPS = 20  # at least, whose mean is compared with limits that are warned of


@dataclass
class Session:
    """A run that trains, on this rank."""

    start: Start
    config: Config  # with values for what the recipe leaves open
    world: World
    stop: StopFlag
    plan: Plan
    watchdog: Watchdog
    loader: Loader
    engine: Engine
    guard: SpikeGuard
    tracker: Tracker
    saver: CheckpointSaver
    ledger: RowLedger | None  # rank 0 writes it
    folder: RunFolder
    precision: str
    computing: ComputeOptions | None = None  # None: nobody has chosen
    mfu: MfuMeter | None = None  # None where nothing is logged
    num_skipped: int = 0  # updates, since the run began
    saved_step: int = 0  # of the newest checkpoint, published or in the making
    validation_loss: float | None = None  # nats per token, if the last step was evaluated
    recent: deque[StepResult] = field(default_factory=deque)
    compiled_code: str | None = None  # what is compiled in the first step, in all that it depends on
    start_was_logged: bool = False  # how long this start took, which its first line tells
    callbacks: Sequence[StepCallback] = ()
    tasks: "HarnessTasks | None" = None  # of the recipe, on rank 0
    communication_s: float = math.nan  # in which this rank was in collectives, in the last step that was measured
    reads_late: bool = False  # what became of an update: when the next step's passes are under way (step.py)

    def is_any_to_stop(self) -> bool:
        """Whether any rank is to stop. Collective."""
        return self.world.sum_ints(self.stop.is_raised()) != [0]

    @functools.cached_property
    def stop_ids(self) -> list[int]:
        """The ids that end a text which the model writes."""
        inherited = read_generation_config(self.config.run_folder / "tokenizer")
        return stop_token_ids(self.loader.prepared.tokenizer, inherited)

    @functools.cached_property
    def bytes_per_id(self) -> torch.Tensor:
        """UTF-8 bytes of each token of the held-out texts, (V,)."""
        return torch.from_numpy(self.loader.prepared.bytes_per_id())
