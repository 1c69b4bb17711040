"""The rows of each step for one rank, as tensors; a position and a ledger that any world size can resume from.

Suffixes of names are shapes: B rows, T targets per row, S = T + 1 ids.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from smoltrain.data import order, packing
from smoltrain.data.cached import Prepared
from smoltrain.errors import Problem, UserError

FORMAT = 1
NO_LABEL = -100  # torch's cross_entropy leaves these targets out


@dataclass(frozen=True)
class Batch:
    """One micro-batch: ids int64 (B, T), and labels int64 (B, T), already one place on; -100 is no target."""

    ids_BT: torch.Tensor
    labels_BT: torch.Tensor


@dataclass(frozen=True)
class StepRows:
    """One rank's part of one step."""

    micro_batches: list[Batch]
    num_tokens: int  # valid labels on this rank
    digest: int  # signed 64 bits; the step's digest is the sum over the ranks, wrapping as an int64 all-reduce does


class Loader:
    """Deals the endless global sequence of rows (see order.py) to one rank.

    The protocol is `take`, train, `consumed`: the position moves only when the optimizer has used the rows, so a step
    that is tried again, or cut short by a crash, sees the same rows.
    """

    def __init__(
        self,
        prepared: Prepared,
        *,
        sequence_length: int,
        rows_per_step: int,
        micro_batch: int,
        accumulation: int,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        assert rows_per_step == micro_batch * accumulation * world_size
        assert 0 <= rank < world_size
        self.num_rows = packing.num_rows(len(prepared.train), sequence_length)
        self.rows_consumed = 0
        self.ledger = order.NO_STEPS
        self.prepared, self._sequence_length, self._seed = prepared, sequence_length, seed
        self._rows_per_step, self._micro_batch, self._accumulation = rows_per_step, micro_batch, accumulation
        self._rank, self._world_size = rank, world_size
        self._taken = False

    @property
    def epoch(self) -> float:
        """How often the training rows have been consumed, with its fraction."""
        return self.rows_consumed / self.num_rows

    @property
    def unique_rows(self) -> int:
        """Distinct training rows that the optimizer has used: an epoch is a permutation, so none comes twice in one."""
        return min(self.rows_consumed, self.num_rows)

    @property
    def tokens_consumed(self) -> int:
        """Targets that the optimizer has used, over all ranks."""
        return self.rows_consumed * self._sequence_length

    def take(self) -> StepRows:
        """The next step's rows for this rank; the same ones until `consumed` is called."""
        micro_batches, digest = [], 0
        for index in range(self._accumulation):
            positions = order.positions(self.rows_consumed, index, self._micro_batch, self._rank, self._world_size)
            rows = [order.row_at(position, self._seed, self.num_rows) for position in positions]
            ids_BS = self._ids(self.prepared.train, rows)
            digest += sum(map(order.row_digest, positions, rows, ids_BS))
            micro_batches.append(_batch(ids_BS))
        num_tokens = sum(int((batch.labels_BT != NO_LABEL).sum()) for batch in micro_batches)
        self._taken = True
        return StepRows(micro_batches, num_tokens, order.signed(digest % order.WORD))

    def consumed(self, step_digest: int) -> None:
        """The optimizer has used the rows last taken; `step_digest` is the sum of all ranks' digests, modulo 2^64."""
        assert self._taken, "consumed() without take(): a step would be skipped"
        self._taken = False
        self.rows_consumed += self._rows_per_step
        self.ledger = order.extend(self.ledger, step_digest)

    def state(self) -> dict[str, Any]:
        """Where the run stands, JSON-able and the same on every rank of any world."""
        return {"format": FORMAT, "position": self.rows_consumed, "ledger": self.ledger, **self._identity()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state`. Errors: UserError, one problem for each way in which it describes another sequence."""
        change = {
            "num_rows": "data or batch.sequence_length, back to what the run began with",
            "seed": "run.seed, back to what the run began with",
            "rows_per_step": "batch.rows_per_step, back to what the run began with",
            "format": "the version of smoltrain, to the one that wrote the checkpoint",
        }
        now = {"format": FORMAT, **self._identity()}
        problems = [
            Problem(f"the checkpoint is of another sequence of rows: {key}", str(now[key]), str(state.get(key)), where)
            for key, where in change.items()
            if now[key] != state.get(key)
        ]
        if problems:
            raise UserError(*problems)
        self.rows_consumed, self.ledger = state["position"], state["ledger"]
        self._taken = False

    def validation(self, rows: int) -> list[Batch]:
        """This rank's batches of at most `rows` held-out rows, evenly spaced; the same rows on any world and each time.

        Every rank gets the same number of full batches, for a forward under ZeRO-3 needs all ranks; rows that fill them
        up have no valid label.
        """
        tokens = self.prepared.validation
        chosen = order.spread(rows, packing.num_rows(len(tokens), self._sequence_length))
        mine = chosen[self._rank :: self._world_size]
        per_rank = math.ceil(len(chosen) / self._world_size)
        num_slots = math.ceil(per_rank / self._micro_batch) * self._micro_batch
        ids_BS = self._ids(tokens, mine + chosen[:1] * (num_slots - len(mine)))
        batches = []
        for start in range(0, num_slots, self._micro_batch):
            batch = _batch(ids_BS[start : start + self._micro_batch])
            batch.labels_BT[len(mine) - start :] = NO_LABEL
            batches.append(batch)
        return batches

    def _identity(self) -> dict[str, int]:
        """What the global sequence is a function of, beside the tokens."""
        return {"num_rows": self.num_rows, "seed": self._seed, "rows_per_step": self._rows_per_step}

    def _ids(self, tokens: np.ndarray, rows: list[int]) -> np.ndarray:
        return np.stack([packing.row(tokens, row, self._sequence_length) for row in rows])


def _batch(ids_BS: np.ndarray) -> Batch:
    inputs_BT, labels_BT = packing.inputs_and_labels(ids_BS.astype(np.int64))
    return Batch(torch.tensor(inputs_BT), torch.tensor(labels_BT))  # copies: the two overlap in ids_BS
