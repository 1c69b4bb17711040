"""One loader over what was prepared: rows out of cached tokens, or out of streams that are read while training."""

from typing import Any

from smoltrain.config.schema import Config
from smoltrain.data.documents.reader_health import ReaderHealth
from smoltrain.data.rows.loader import Loader, StepLayout
from smoltrain.data.rows.row_source import CachedRowSource, RowSource, StreamedRowSource
from smoltrain.data.rows.streams import StreamedSource
from smoltrain.data.tokens.load_prepared import load_prepared_data


def open_loader(config: Config, rank: int, world_size: int, *, rows_per_step: int, accumulation: int) -> Loader:
    """The loader of one rank, over what `prepare_run_data` made (in a run folder that every rank can read).

    rows_per_step is over all ranks and must be batch.micro_batch x accumulation x world_size. Errors: UserError if
    the data are not prepared.
    """
    prepared = load_prepared_data(config)
    batch, data, seed = config.batch, config.data, config.run.seed
    layout = StepLayout(
        batch.sequence_length, rows_per_step, batch.micro_batch_rows, accumulation, rank, world_size,
        config.packing.document_mask,
    )  # fmt: skip
    identity: dict[str, Any] = {
        "mode": prepared.mode,
        "seed": seed,
        "rows_per_step": rows_per_step,
        "sequence_length": batch.sequence_length,
        "sources": [part.name for part in data.parts],
    }
    health = ReaderHealth()
    row_source: RowSource
    if prepared.mode == "cached":
        row_source = CachedRowSource(prepared.train, batch.sequence_length, seed)
        identity["num_rows"] = row_source.num_rows
    else:
        held_out = frozenset(int(hashed) for tokens in prepared.validation for hashed in tokens.hashes)
        sources = tuple(
            StreamedSource(
                number, part, data, shards, prepared.streams, prepared.tokenizer, prepared.dtype,
                batch.sequence_length, seed, held_out,
            )
            for number, (part, shards) in enumerate(zip(data.parts, prepared.shards, strict=True))
        )  # fmt: skip
        row_source = StreamedRowSource(sources, rank, world_size, health)
        identity |= {"streams": prepared.streams, "shuffle_rows": data.shuffle_rows}
    weights = {part.name: part.weight for part in data.parts}
    return Loader(prepared, row_source, layout, identity=identity, weights=weights, health=health)
