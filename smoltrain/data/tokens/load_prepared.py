"""What was prepared for a run, found again: its index, tokenizer and tokens; and whether all is as it was written."""

from pathlib import Path

import numpy as np

from smoltrain import files
from smoltrain.config.schema import Config
from smoltrain.data.tokenizers.tokenizer import Tokenizer
from smoltrain.data.tokens.check_tokens import find_damaged_files, find_damaged_tokenizer_files, recorded_token_files
from smoltrain.data.tokens.index import WHAT_WAS_PREPARED, DataIndex, data_index_file, read_data_index
from smoltrain.data.tokens.packing import token_dtype
from smoltrain.data.tokens.prepared import PreparedData
from smoltrain.data.tokens.token_files import MappedTokens
from smoltrain.data.tokens.tokenise_validation import shards_from_json
from smoltrain.errors import Problem, UserError


def load_prepared_data(config: Config) -> PreparedData:
    """What `prepare_run_data` made.

    Errors: UserError if there is nothing, or a file has another size, or the tokenizer another digest.
    """
    index = read_run_index(config)
    tokenizer = load_run_tokenizer(config, config.run_folder / "tokenizer", index)
    home = run_tokens_folder(config, index)
    train, validation, shards = [], [], []
    for part in config.data.parts:
        source = index.sources[part.name]
        folder, names = home / part.name, source.shard_names or ()
        validation.append(MappedTokens.open(folder, source.validation, names))
        if source.train is not None:
            train.append(MappedTokens.open(folder, source.train, names))
        if source.shards is not None:
            shards.append(shards_from_json(source.shards, part))
    return PreparedData(
        tokenizer, config.tokenizer.name, index.mode, index.why, np.dtype(index.dtype), tuple(train),
        tuple(validation), tuple(shards), index.streams, index,
    )  # fmt: skip


def read_run_index(config: Config) -> DataIndex:
    """The run's index, its sources in the config's order.

    Errors: those of read_data_index; UserError for other sources.
    """
    index = read_data_index(data_index_file(config.run_folder))
    names = [part.name for part in config.data.parts]
    if set(names) != set(index.sources):
        what, want = f"the run {config.run.name!r} was prepared from other sources", ", ".join(index.sources)
        raise UserError(Problem(what, ", ".join(names), want, "data.sources, or run.name"))
    index.sources = {name: index.sources[name] for name in names}
    return index


def run_tokens_folder(config: Config, index: DataIndex) -> Path:
    """Where the tokens of a run are. Errors: UserError if they are in a cache that the config does not name."""
    if index.cache is None:
        return config.run_folder / "data"
    if config.data.cache is None:
        want = f"the folder that holds {index.cache}"
        raise UserError(Problem("the tokens of the run are in a cache", "data.cache=null", want, "data.cache"))
    return files.resolve_inside(config.data.cache, index.cache, str(data_index_file(config.run_folder))) / "data"


def inspect_prepared_data(config: Config) -> tuple[str, list[str]]:
    """What was checked of a run's tokens and tokenizer, in words, and what is wrong with them; nothing is mended.

    Errors: UserError if there are none, or another data.cache than theirs.
    """
    index = read_run_index(config)
    home, records = run_tokens_folder(config, index), recorded_token_files(index.sources)
    folder = config.run_folder / "tokenizer"
    damaged = find_damaged_files(home, records) | find_damaged_tokenizer_files(folder, index)
    faults = [f"{name}: {fault}" for name, fault in damaged.items()]
    try:
        load_run_tokenizer(config, folder, index)
    except UserError as error:
        faults += [str(problem) for problem in error.problems]
    size = sum(made.bytes for made in records.values()) / 2**20
    return f"{len(records)} files of tokens ({size:,.1f} MiB) and the tokenizer are as they were written", faults


def load_run_tokenizer(config: Config, folder: Path, index: DataIndex) -> Tokenizer:
    """The tokenizer beside an index. Errors: UserError if it is another one than its ids were made with."""
    pad = index.fingerprint.pad  # not the config's: _compare_fingerprints compares the two and shows both
    tokenizer = Tokenizer.from_folder(folder, config.tokenizer.separator, pad)
    own = (tokenizer.fingerprint(), tokenizer.separator_id, token_dtype(tokenizer).name)
    if own != (index.tokenizer_sha256, index.separator_id, index.dtype):
        raise UserError(Problem("the run's tokenizer has changed", "another one", WHAT_WAS_PREPARED, str(folder)))
    return tokenizer
