"""Are the tokens, and the tokenizer beside them, still what was written? If not: the same once more, or a refusal.

Checked whenever a run starts, before anything is read of them, at about 1 GB/s and core: a disk or a copy that
changed one bit would otherwise train, and nothing would ever say so.
"""

import contextlib
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from smoltrain import files
from smoltrain.config.schema import Config, MixedSource, TokenizerSection
from smoltrain.data.documents.listing import SourceListing, list_one_source
from smoltrain.data.documents.reader_health import ReaderHealth
from smoltrain.data.progress import report_progress
from smoltrain.data.tokenizers import by_name
from smoltrain.data.tokenizers.tokenizer import TOKENIZER_FILE, Tokenizer
from smoltrain.data.tokens import tokenise
from smoltrain.data.tokens.index import WHAT_WAS_PREPARED, DataIndex, IndexFile, IndexSource
from smoltrain.data.tokens.tokenise_validation import tokenise_held_out
from smoltrain.distributed.cpu_cores import num_cores
from smoltrain.errors import Problem, UserError

REPORTED_BYTES = 2**30  # from which on it is said that they are checked
REBUILD_FOLDER = "anew.partial"  # where damaged tokens are made once more


def recorded_token_files(sources: dict[str, IndexSource]) -> dict[str, IndexFile]:
    """SOURCE/NAME of each file of tokens -> its size (bytes) and SHA-256."""
    return {
        f"{name}/{file}": made
        for name, source in sources.items()
        for side in source.sides
        for file, made in side.files.items()
    }


def find_damaged_files(folder: Path, records: dict[str, IndexFile]) -> dict[str, str]:
    """Those files below `folder` that are not as they were written -> what is wrong with each. Reads all of them."""
    num_bytes = sum(made.bytes for made in records.values())
    num_checked = 0  # bytes
    damaged = {}

    def describe_progress() -> tuple[str, float]:
        words = f"{num_checked / 2**30:.1f} of {num_bytes / 2**30:.1f} GiB of tokens looked at for damage"
        return words, num_checked / max(1, num_bytes)

    is_reported = num_bytes >= REPORTED_BYTES
    began = time.monotonic()
    with (
        report_progress(describe_progress if is_reported else None, ReaderHealth()),
        ThreadPoolExecutor(max(1, num_cores())) as threads,
    ):
        faults = threads.map(lambda name: _describe_damage(folder, name, records[name]), records)
        for (name, made), fault in zip(records.items(), faults, strict=True):
            num_checked += made.bytes
            if fault is not None:
                damaged[name] = fault
    if is_reported:
        took = time.monotonic() - began
        print(f"data: {num_bytes / 2**30:.1f} GiB of tokens looked at for damage in {took:.0f} s", flush=True)
    return damaged


def repair_tokens(
    config: Config, index: DataIndex, folder: Path, listed: dict[str, SourceListing], tokenizer: Tokenizer
) -> None:
    """Check all tokens below `folder`, and make those that are damaged once more out of their documents.

    `listed` are the files of those sources that were listed already. Errors: UserError, naming the file, where that
    does not give the very same bytes; then no file of that source was replaced.
    """
    records = recorded_token_files(index.sources)
    damaged = find_damaged_files(folder, records)
    for part in config.data.parts:
        own = {name: fault for name, fault in damaged.items() if name.startswith(f"{part.name}/")}
        for name, fault in own.items():
            print(f"data: {name} is damaged ({fault}); it is made anew from the documents of {part.name!r}", flush=True)
        if not own:
            continue
        with _scratch_folder(folder / REBUILD_FOLDER) as scratch:
            try:
                rebuilt = _rebuild_source(part, config, index, scratch, listed, tokenizer)
            except (UserError, OSError) as error:
                reason = error.problems[0] if isinstance(error, UserError) else files.describe_error(error)
                raise _unrepairable_error(own, folder, f"its documents cannot be read again ({reason})") from None
            if any(rebuilt.get(name) != records[name] for name in own):
                raise _unrepairable_error(own, folder, f"the documents of {part.name!r} no longer give the same tokens")
            for name in own:
                files.commit_file(scratch / name, folder / name)


def find_damaged_tokenizer_files(folder: Path, index: DataIndex) -> dict[str, str]:
    """As find_damaged_files, of a tokenizer's folder; of data of older versions it is not known what lay there."""
    faults = {name: _describe_damage(folder, name, made) for name, made in (index.tokenizer_files or {}).items()}
    return {name: fault for name, fault in faults.items() if fault is not None}


def repair_tokenizer(folder: Path, index: DataIndex, section: TokenizerSection) -> None:
    """What stands beside a tokenizer.json that is right, written once more if it is damaged.

    Errors: UserError if the tokenizer's source no longer gives what was there.
    """
    damaged = find_damaged_tokenizer_files(folder, index)
    if not damaged or TOKENIZER_FILE in damaged:  # for which whoever reads it has words of its own
        return
    names = ", ".join(f"{name} ({fault})" for name, fault in damaged.items())
    print(f"data: {folder} is damaged: {names}; it is written anew", flush=True)
    if section.name == "bpe":  # nothing came with it
        for name in damaged:
            (folder / name).unlink(missing_ok=True)
        Tokenizer.from_folder(folder, section.separator, section.pad).save(folder)
    else:
        by_name.load_named_tokenizer(section).save(folder)
    for name, fault in find_damaged_tokenizer_files(folder, index).items():
        raise UserError(Problem(f"the run's tokenizer is damaged: {name}", fault, WHAT_WAS_PREPARED, str(folder)))


def _describe_damage(folder: Path, name: str, made: IndexFile) -> str | None:
    """What is wrong with a file; None if it is as it was written."""
    path = files.resolve_inside(folder, name, str(folder / "index.json"))
    try:
        size = files.stat_regular_file(path).st_size
        if size != made.bytes:
            return f"{size:,} bytes, not {made.bytes:,}"
        if files.file_sha256(path) != made.sha256:
            return "other bytes than were written (SHA-256 differs)"
    except OSError as error:
        return files.describe_error(error)
    return None


@contextlib.contextmanager
def _scratch_folder(folder: Path) -> Iterator[Path]:
    """A folder that is not there before the block, nor afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _rebuild_source(
    part: MixedSource, config: Config, index: DataIndex, folder: Path, listed: dict[str, SourceListing],
    tokenizer: Tokenizer,
) -> dict[str, IndexFile]:  # fmt: skip
    """All tokens of a source once more, into a folder of their own; see recorded_token_files."""
    data, source = config.data, index.sources[part.name]

    def list_source(wanted: MixedSource) -> SourceListing:
        commit = index.fingerprint.sources[wanted.name].get("commit")  # of the first start
        at = commit if isinstance(commit, str) else None
        return listed.get(wanted.name) or list_one_source(wanted, config.data, at)

    if index.mode == "stream":
        made, _ = tokenise_held_out(
            part, data, list_source(part), tokenizer, folder,
            num_tokens=source.validation.tokens, num_streams=index.streams,
        )  # fmt: skip
        return recorded_token_files({part.name: made})
    parts = [part]
    if any(other.copies for other in index.sources.values()):
        parts = list(data.parts)  # what is left out of a source, the others decide
    elif data.sources:
        data = data.model_copy(update={"sources": (part,)})
    only = config.model_copy(update={"data": data})
    listings = {wanted.name: list_source(wanted) for wanted in parts}
    fingerprint = index.fingerprint.to_json()
    return recorded_token_files(tokenise.tokenise_sources(only, tokenizer, listings, fingerprint, folder))


def _unrepairable_error(damaged: dict[str, str], folder: Path, why: str) -> UserError:
    name, saw = next(iter(damaged.items()))
    want = f"what was written; it cannot be made anew, as {why}"
    change = f"the data, back to what they were, or {folder}: delete it to prepare anew"
    return UserError(Problem(f"{name} is damaged", saw, want, change))
