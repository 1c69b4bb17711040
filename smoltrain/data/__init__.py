"""Data: from documents to the rows of each step.

    sources -> readers -> faults -> tokenizer and packing -> tokens (cached) or streams -> supply -> loader
    which      how one    what is   documents to token        once, to     while         rows by   rows of a step
    files      is read    tried     ids                       files        training      number    as tensors
                          again

One process calls `prepare(config, rows_per_step, world_size)`; then every rank calls `open`. From then on the run lives
on its own copies of tokenizer and validation tokens, and in cached mode of all tokens.
"""

import functools
from typing import Any

from smoltrain.data.faults import Health
from smoltrain.data.loader import Batch, Loader, Shape, StepRows, StepTotals, merged
from smoltrain.data.passages import NamedRow, located
from smoltrain.data.prepare import Prepared, check_tokenizer, inspect, load, prepare
from smoltrain.data.streams import Source
from smoltrain.data.supply import CachedRows, StreamedRows, Supply
from smoltrain.schema import Config

__all__ = [
    "Batch",
    "Loader",
    "NamedRow",
    "Prepared",
    "StepRows",
    "StepTotals",
    "check_tokenizer",
    "inspect",
    "load",
    "merged",
    "open",
    "prepare",
]


def open(config: Config, rank: int, world_size: int, *, rows_per_step: int, accumulation: int) -> Loader:
    """The loader of one rank, over what `prepare` made (in a run folder that every rank can read).

    rows_per_step is over all ranks and must be batch.micro_batch x accumulation x world_size. Errors: UserError if
    the data are not prepared.
    """
    prepared = load(config)
    batch, data, seed = config.batch, config.data, config.run.seed
    shape = Shape(
        batch.sequence_length, rows_per_step, batch.rows_at_once, accumulation, rank, world_size,
        config.packing.document_mask,
    )  # fmt: skip
    identity: dict[str, Any] = {
        "mode": prepared.mode,
        "seed": seed,
        "rows_per_step": rows_per_step,
        "sequence_length": batch.sequence_length,
        "sources": [part.name for part in data.parts],
    }
    health = Health()
    supply: Supply
    if prepared.mode == "cached":
        supply = CachedRows(prepared.train, batch.sequence_length, seed)
        identity["num_rows"] = supply.num_rows
    else:
        held_out = frozenset(int(hashed) for tokens in prepared.validation for hashed in tokens.hashes)
        sources = tuple(
            Source(
                number, part, data, shards, prepared.streams, prepared.tokenizer, prepared.dtype,
                batch.sequence_length, seed, held_out,
            )
            for number, (part, shards) in enumerate(zip(data.parts, prepared.shards, strict=True))
        )  # fmt: skip
        supply = StreamedRows(sources, rank, world_size, health)
        identity |= {"streams": prepared.streams, "shuffle_rows": data.shuffle_rows}
    weights = {part.name: part.weight for part in data.parts}
    locate = functools.partial(located, data=data, prepared=prepared) if prepared.mode == "cached" else list
    return Loader(prepared, supply, shape, identity=identity, weights=weights, health=health, locate=locate)
