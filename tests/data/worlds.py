"""All ranks of a world in one process: their loaders, one step of all of them, and what they saw."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smoltrain.config.schema import DataSection
from smoltrain.data.documents.reader_health import ReaderHealth
from smoltrain.data.rows.loader import Loader, StepLayout, merge_loader_states
from smoltrain.data.rows.row_source import CachedRowSource, RowSource, StreamedRowSource
from smoltrain.data.rows.streams import StreamedSource
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokens.index import DataIndex
from smoltrain.data.tokens.prepared import PreparedData
from smoltrain.data.tokens.token_files import MappedTokens
from tests.data.documents.files import list_shards

B, T, SEED = 12, 4, 7
WORLDS = (1, 2, 3, 4, 6)
NO_INDEX = DataIndex.model_construct()  # nothing of it is asked for here
TOKENIZER = Tokenizer.train_bpe(["x"], 257, "<|endoftext|>")  # every byte is a token, the separator is 0


def counting(num_rows: int, first: int = 1) -> MappedTokens:
    """A stream whose tokens are their own places (from `first` on), so that a row says which one it is."""
    ids = np.arange(first, first + num_rows * T + 1, dtype=np.uint16)
    starts = np.arange(0, len(ids), 6, dtype=np.uint64)
    return MappedTokens([ids], starts, starts * np.uint64(0x9E3779B97F4A7C15) + np.uint64(first))


def cached(*num_rows: int, validation: int = 17) -> PreparedData:
    """Sources of so many rows."""
    train = tuple(counting(n, 1 + 1000 * i) for i, n in enumerate(num_rows))
    held_out = tuple(counting(validation, 30_000 + 1000 * i) for i in range(len(num_rows)))
    return PreparedData(TOKENIZER, "bytes", "cached", "", np.dtype(np.uint16), train, held_out, (), 1, NO_INDEX)


def write(folder: Path, texts: list[list[str]]) -> Path:
    """A folder of .jsonl shards."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, shard in enumerate(texts):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in shard)
        (folder / f"{i:03}.jsonl").write_text(lines)
    return folder


def streamed(folders: dict[str, Path], num_streams: int) -> PreparedData:
    """Sources of shards in folders, by name."""
    found = tuple(tuple(list_shards(part)) for part in section(folders).parts)
    held_out = tuple(counting(17, 30_000) for _ in folders)
    dtype = np.dtype(np.uint16)
    return PreparedData(TOKENIZER, "bytes", "stream", "", dtype, (), held_out, found, num_streams, NO_INDEX)


def section(folders: dict[str, Path], **changes: Any) -> DataSection:
    """What a recipe would say of these folders."""
    sources = [{"name": name, "path": str(path), "weight": 1.0} for name, path in folders.items()]
    return DataSection.model_validate({"sources": sources, "shuffle_rows": 5, "validation_share": 1e-9} | changes)


class World:
    """The loaders of all ranks of a run."""

    def __init__(
        self,
        prepared: PreparedData,
        size: int,
        data: DataSection | None = None,
        *,
        micro_batch: int = 1,
        weights: dict[str, float] | None = None,
        document_mask: bool = False,
        held_out: frozenset[int] = frozenset(),
        **changes: Any,
    ) -> None:
        names = [part.name for part in data.parts] if data else [f"s{i}" for i in range(len(prepared.train))]
        weights = weights or dict.fromkeys(names, 1.0)
        identity = {"seed": SEED, "rows_per_step": B, "streams": prepared.streams} | changes
        self.ranks: list[Loader] = []
        for rank in range(size):
            accumulation = identity["rows_per_step"] // size // micro_batch
            layout = StepLayout(T, identity["rows_per_step"], micro_batch, accumulation,
                          rank, size, document_mask)  # fmt: skip
            row_source: RowSource
            health = ReaderHealth()
            if prepared.mode == "cached":
                row_source = CachedRowSource(prepared.train, T, identity["seed"])
                own = identity | {"num_rows": row_source.num_rows}
            else:
                assert data is not None
                own = identity
                row_source = StreamedRowSource(
                    tuple(
                        StreamedSource(
                            i, part, data, found, prepared.streams, TOKENIZER, prepared.dtype, T, identity["seed"],
                            held_out,
                        )
                        for i, (part, found) in enumerate(zip(data.parts, prepared.shards, strict=True))
                    ),
                    rank, size, health,
                )  # fmt: skip
            self.ranks.append(Loader(prepared, row_source, layout, identity=own, weights=weights, health=health))

    def step(self) -> np.ndarray:
        """One step on all ranks; the digests of its rows, by position."""
        taken = [loader.fetch_step_rows() for loader in self.ranks]
        counts = torch.tensor([rows.counts for rows in taken]).sum(0).tolist()  # wraps, as the all-reduce does
        (totals, *others) = [loader.unpack_totals(counts) for loader in self.ranks]
        assert all((other.digests == totals.digests).all() for other in others)
        for loader in self.ranks:
            loader.mark_consumed(totals)
        return totals.digests

    def steps(self, num: int, mix: dict[str, float] | None = None) -> np.ndarray:
        """The digests of all rows of some steps."""
        for loader in self.ranks:
            loader.set_source_mix(mix)
        return np.concatenate([np.empty(0, np.uint64), *(self.step() for _ in range(num))])

    def rows(self) -> list[list[int]]:
        """The ids of the next step's rows, in no order that means anything, each with its last label."""
        batches = [batch for loader in self.ranks for batch in loader.fetch_step_rows().micro_batches]
        return [
            [*ids.tolist(), int(labels[-1])]
            for batch in batches
            for ids, labels in zip(batch.ids_BT, batch.labels_BT, strict=True)
        ]

    def state(self) -> str:
        """As a checkpoint would keep it."""
        states = [loader.state() for loader in self.ranks]
        return json.dumps(merge_loader_states(states))

    def load(self, state: str) -> None:
        for loader in self.ranks:
            loader.load_state(json.loads(state))

    def close(self) -> None:
        for loader in self.ranks:
            loader.close()

    @property
    def ledger(self) -> str:
        (ledger,) = {loader.ledger for loader in self.ranks}
        return ledger
