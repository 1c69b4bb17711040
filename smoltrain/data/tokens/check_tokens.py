"""Are the tokens, and the tokenizer beside them, still what was written? If not: the same once more, or a refusal.

Looked at whenever a run starts, before anything is read of them, at about 1 GB/s and core: a disk or a copy that
changed one bit would otherwise train, and nothing would ever say so.
"""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from smoltrain import files
from smoltrain.config.schema import Config, MixedSource, TokenizerSection
from smoltrain.data.documents.listing import SourceListing, list_one_source
from smoltrain.data.documents.retry import ReaderHealth
from smoltrain.data.progress import report_progress
from smoltrain.data.tokenizers import by_name
from smoltrain.data.tokenizers.tokenizer import TOKENIZER_FILE, Tokenizer
from smoltrain.data.tokens import tokenise
from smoltrain.data.tokens.token_files import SIDES
from smoltrain.data.tokens.tokenise_validation import tokenise_held_out
from smoltrain.distributed.cpu_cores import num_cores
from smoltrain.errors import Problem, UserError

REPORTED_BYTES = 2**30  # bytes, from which on it is said that they are looked at
REBUILD_FOLDER = "anew.partial"  # where damaged tokens are made once more


def recorded_token_files(index: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """SOURCE/NAME of each file of tokens -> its size (bytes) and SHA-256."""
    return {
        f"{name}/{file}": made
        for name, about in index["sources"].items()
        for side in SIDES
        for file, made in about.get(side, {"files": {}})["files"].items()
    }


def find_damaged_files(folder: Path, records: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Those files below `folder` that are not as they were written -> what is wrong with each. Reads all of them."""
    size, done, began = sum(made["bytes"] for made in records.values()), [0], time.monotonic()

    def look(name: str) -> str:
        wrong = _describe_damage(folder, name, records[name])
        done[0] += records[name]["bytes"]
        return wrong

    def state() -> tuple[str, float]:
        words = f"{done[0] / 2**30:.1f} of {size / 2**30:.1f} GiB of tokens looked at for damage"
        return words, done[0] / max(1, size)

    with (
        report_progress(state if size >= REPORTED_BYTES else None, ReaderHealth()),
        ThreadPoolExecutor(max(1, num_cores())) as threads,
    ):
        found = dict(zip(records, threads.map(look, records), strict=True))
    if size >= REPORTED_BYTES:
        took = time.monotonic() - began
        print(f"data: {size / 2**30:.1f} GiB of tokens looked at for damage in {took:.0f} s", flush=True)
    return {name: wrong for name, wrong in found.items() if wrong}


def _describe_damage(folder: Path, name: str, made: dict[str, Any]) -> str:
    path = files.resolve_inside(folder, name, str(folder / "index.json"))
    try:
        if (saw := files.stat_regular_file(path).st_size) != made["bytes"]:
            return f"{saw:,} bytes, not {made['bytes']:,}"
        return "" if files.file_sha256(path) == made["sha256"] else "other bytes than were written (SHA-256 differs)"
    except OSError as error:
        return files.describe_error(error)


def repair_tokens(
    config: Config, index: dict[str, Any], folder: Path, listed: dict[str, SourceListing], tokenizer: Tokenizer
) -> None:
    """Look at all tokens below `folder`, and make those that are damaged once more out of their documents.

    `listed` are the files of those sources that were listed already. Errors: UserError, naming the file, where that
    does not give what was there before; nothing was replaced then.
    """
    records = recorded_token_files(index)
    wrong = find_damaged_files(folder, records)
    for part in config.data.parts:
        mine = {name: why for name, why in wrong.items() if name.startswith(f"{part.name}/")}
        for name, why in mine.items():
            print(f"data: {name} is damaged ({why}); it is made anew from the documents of {part.name!r}", flush=True)
        if mine:
            shutil.rmtree(folder / REBUILD_FOLDER, ignore_errors=True)
            try:
                _replace_damaged_files(
                    part,
                    mine,
                    records,
                    folder,
                    lambda p=part: _rebuild_source(p, config, index, folder, listed, tokenizer),
                )
            finally:
                shutil.rmtree(folder / REBUILD_FOLDER, ignore_errors=True)


def find_damaged_tokenizer_files(folder: Path, index: dict[str, Any]) -> dict[str, str]:
    """As `damaged`, of a tokenizer's folder; nothing is known of one that was prepared before it was recorded."""
    records = index.get("tokenizer_files") or {}
    return {name: why for name, made in records.items() if (why := _describe_damage(folder, name, made))}


def repair_tokenizer(folder: Path, index: dict[str, Any], section: TokenizerSection) -> None:
    """What stands beside a tokenizer.json that is right, written once more if it is damaged.

    Errors: UserError if the tokenizer's source no longer gives what was there.
    """
    wrong = find_damaged_tokenizer_files(folder, index)
    if not wrong or TOKENIZER_FILE in wrong:  # for which whoever reads it has words of its own
        return
    names = ", ".join(f"{name} ({why})" for name, why in wrong.items())
    print(f"data: {folder} is damaged: {names}; it is written anew", flush=True)
    if section.name == "bpe":  # nothing came with it
        for name in wrong:
            (folder / name).unlink(missing_ok=True)
        Tokenizer.from_folder(folder, section.separator, section.pad).save(folder)
    else:
        by_name.load_named_tokenizer(section).save(folder)
    for name, why in find_damaged_tokenizer_files(folder, index).items():
        want = "what was prepared (delete the folder to prepare anew)"
        raise UserError(Problem(f"the run's tokenizer is damaged: {name}", why, want, str(folder)))


def _replace_damaged_files(
    part: MixedSource, wrong: dict[str, str], records: dict[str, Any], folder: Path, anew: Any
) -> None:
    """Put files made anew in the place of the damaged ones. Errors: UserError unless they are the very same bytes."""
    try:
        made = anew()
    except (UserError, OSError) as error:
        first = error.problems[0] if isinstance(error, UserError) else files.describe_error(error)
        raise _unrepairable_error(wrong, folder, f"its documents cannot be read again ({first})") from None
    if any(made.get(name) != records[name] for name in wrong):
        raise _unrepairable_error(wrong, folder, f"the documents of {part.name!r} no longer give the same tokens")
    for name in wrong:
        files.commit_file(folder / REBUILD_FOLDER / name, folder / name)


def _rebuild_source(
    part: MixedSource, config: Config, index: dict[str, Any], folder: Path, listed: dict[str, SourceListing],
    tokenizer: Tokenizer,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """All tokens of a source once more, into FOLDER/ANEW; what `written` says of them."""
    data, about = config.data, index["sources"][part.name]
    listing = listed.get(part.name) or list_one_source(part, data)
    if index["mode"] == "stream":
        made, _ = tokenise_held_out(
            part, data, listing, tokenizer, folder / REBUILD_FOLDER,
            num_tokens=about["validation"]["tokens"], num_streams=index["streams"],
        )  # fmt: skip
        return recorded_token_files({"sources": {part.name: made}})
    if any(source.get("copies") for source in index["sources"].values()):  # what is left out, the other sources decide
        everything = {p.name: listed.get(p.name) or list_one_source(p, data) for p in data.parts}
        made = tokenise.tokenise_sources(config, tokenizer, everything, index["fingerprint"], folder / REBUILD_FOLDER)
        return recorded_token_files({"sources": made})
    alone = data.model_copy(update={"sources": (part,)}) if data.sources else data
    only = config.model_copy(update={"data": alone})
    made = tokenise.tokenise_sources(
        only, tokenizer, {part.name: listing}, index["fingerprint"], folder / REBUILD_FOLDER
    )
    return recorded_token_files({"sources": made})


def _unrepairable_error(wrong: dict[str, str], folder: Path, why: str) -> UserError:
    name, saw = next(iter(wrong.items()))
    want = f"what was written; it cannot be made anew, as {why}"
    change = f"the data, back to what they were, or {folder}: delete it to prepare anew"
    return UserError(Problem(f"{name} is damaged", saw, want, change))
