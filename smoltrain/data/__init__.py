"""Data: documents (sources) to token ids (tokenizer) to files (cached) to rows (packing, order) to tensors (loader).

One process calls `prepare(config, rows_per_step)`; then every rank calls `open`. From then on the run lives on its own
copies of tokenizer and tokens, and asks neither the Hub nor a package.
"""

from smoltrain.data.cached import Prepared, check_rows, load, prepare
from smoltrain.data.loader import Batch, Loader, StepRows
from smoltrain.schema import Config

__all__ = ["Batch", "Loader", "Prepared", "StepRows", "open", "prepare"]


def open(config: Config, rank: int, world_size: int, *, rows_per_step: int, accumulation: int) -> Loader:
    """The loader of one rank, over the tokens that `prepare` made (in a run folder that every rank can read).

    rows_per_step is over all ranks and must be batch.micro_batch x accumulation x world_size. Errors: UserError if
    the data are not prepared, or hold fewer rows than one step or no row for validation.
    """
    prepared = load(config)
    check_rows(len(prepared.train), len(prepared.validation), config, rows_per_step)
    return Loader(
        prepared,
        sequence_length=config.batch.sequence_length,
        rows_per_step=rows_per_step,
        micro_batch=config.batch.micro_batch,
        accumulation=accumulation,
        rank=rank,
        world_size=world_size,
        seed=config.run.seed,
    )
