"""What is known of a new run's data before anything slow is done: files, tokenizer, cached or streamed and why."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from smoltrain.config.schema import Config, DataSection
from smoltrain.data.documents.check_files import check_source_files
from smoltrain.data.documents.listing import SourceListing, list_all_sources
from smoltrain.data.tokenizers import by_name
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokenizers.train_bpe import check_bpe_separator, train_bpe_tokenizer
from smoltrain.data.tokens.check_fit import check_enough_rows, check_vocab_size
from smoltrain.data.tokens.fingerprints import make_fingerprint
from smoltrain.data.tokens.index import INDEX_FORMAT, DataIndex, IndexSource
from smoltrain.data.tokens.packing import token_dtype

MAX_AUTO_CACHED_MIB = 256  # of local files, up to which they are cached of themselves


@dataclass(frozen=True)
class Preparation:
    """What is known of a new run's data before anything slow is done."""

    config: Config
    rows_per_step: int
    world_size: int
    given: Tokenizer | None  # None: a BPE is to be trained
    listed: dict[str, SourceListing]
    mode: str
    mode_reason: str
    fingerprint: dict[str, Any]

    @property
    def not_read(self) -> dict[str, int]:
        """How many files that lie among the sources are not read, by kind."""
        return dict(sum((Counter(listing.unread) for listing in self.listed.values()), Counter[str]()))

    def get_tokenizer(self) -> Tokenizer:
        """The one that was given, or one trained on the documents."""
        mib = _local_mib(self.listed)
        is_small = mib <= MAX_AUTO_CACHED_MIB
        return self.given or train_bpe_tokenizer(self.config, self.listed, num_bytes=mib * 2**20, small=is_small)

    def make_index(self, tokenizer: Tokenizer, num_streams: int, sources: dict[str, IndexSource]) -> DataIndex:
        """All but the files of the tokenizer. Errors: UserError for too few rows."""
        index = DataIndex.model_validate(
            {
                "format": INDEX_FORMAT,
                "mode": self.mode,
                "why": self.mode_reason,
                "fingerprint": self.fingerprint,
                "tokenizer_sha256": tokenizer.fingerprint(),
                "separator_id": tokenizer.separator_id,
                "dtype": token_dtype(tokenizer).name,
                "streams": num_streams,
                "sources": sources,
                "not_read": self.not_read,
            }
        )
        check_enough_rows(index, self.config, self.rows_per_step)
        return index


def plan_preparation(config: Config, rows_per_step: int, world_size: int, *, ahead: bool) -> Preparation:
    """Errors: UserError for a tokenizer that does not fit, and files that cannot be read."""
    section = config.tokenizer
    check_bpe_separator(section)
    given = None if section.name == "bpe" else by_name.load_named_tokenizer(section)
    num_ids = given.num_ids if given else (section.vocab_size or 0) + (section.pad is not None)
    check_vocab_size(num_ids, config)  # a BPE: before training it
    listed = list_all_sources(config)
    for line in check_source_files(listed, config.data):
        print(f"data: {line}", flush=True)
    mode, mode_reason = choose_data_mode(config.data, listed)
    if ahead and config.data.mode == "auto" and mode == "stream":
        mode, mode_reason = "cached", "it was prepared ahead"
    fingerprint = make_fingerprint(config, given, mode, listed)
    return Preparation(config, rows_per_step, world_size, given, listed, mode, mode_reason, fingerprint)


def choose_data_mode(data: DataSection, listed: dict[str, SourceListing]) -> tuple[str, str]:
    """The mode of a new run, and why."""
    if data.mode != "auto":
        return data.mode, f"data.mode={data.mode}"
    if data.cache is not None:
        return "cached", "data.cache names a folder"
    remote = [name for name, listing in listed.items() if not all(shard.is_local for shard in listing.all_shards)]
    if remote:
        return "stream", f"{', '.join(remote)} {'is' if len(remote) == 1 else 'are'} not on this machine"
    mib = math.ceil(_local_mib(listed))
    if mib <= MAX_AUTO_CACHED_MIB:
        return "cached", f"{mib:,} MiB of local files, at most {MAX_AUTO_CACHED_MIB} are cached"
    return "stream", f"{mib:,} MiB of local files, only up to {MAX_AUTO_CACHED_MIB} are cached"


def _local_mib(listed: dict[str, SourceListing]) -> float:
    """Size of all sources on this machine; infinite if any is elsewhere."""
    shards = [shard for listing in listed.values() for shard in listing.all_shards]
    return sum(shard.size or 0 for shard in shards) / 2**20 if all(shard.is_local for shard in shards) else math.inf
