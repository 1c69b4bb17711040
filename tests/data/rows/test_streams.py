"""Streams: every document once an epoch, in one order on any number of ranks, from any kill on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smoltrain.data.documents.held_out import is_held_out
from smoltrain.data.order import permute_places
from smoltrain.data.rows.streams import ROW_ORDER, SHARD_ORDER, deal_shards
from smoltrain.errors import UserError
from tests.data.worlds import SEED, TOKENIZER, WORLDS, B, T, World, section, streamed, write

V, K = 12, 5  # streams, rows of a block
LIVES = st.lists(st.tuples(st.sampled_from(WORLDS), st.integers(0, 6)), min_size=2, max_size=4)
Make = Callable[..., tuple[Any, Any]]


def corpus(num_shards: int, num_documents: int, tag: str = "d") -> list[list[str]]:
    """Shards of documents of very different lengths that say who they are."""
    return [
        [f"<{tag}{s}.{d}>" + "x" * (7 * (s + 3 * d) % 61 + (200 if d == 3 else 0)) for d in range(num_documents)]
        for s in range(num_shards)
    ]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """(prepared, section) of corpora, written once each."""
    made: dict[str, Path] = {}

    def of(*shapes: tuple[int, int], num_streams: int = V, **changes: Any) -> tuple[Any, Any]:
        folders = {}
        for i, shape in enumerate(shapes):
            key = f"{i}-{shape}"
            if key not in made:
                made[key] = write(tmp_path_factory.mktemp("corpus") / "c", corpus(*shape, tag="ab"[i]))
            folders[f"s{i}"] = made[key]
        return streamed(folders, num_streams), section(folders, **changes)

    return of


def by_definition(texts: list[list[str]], stream: int, num_streams: int, num_rows: int) -> list[list[int]]:
    """The first rows of a stream of source 0, told once more in the plainest way."""
    if len(texts) >= num_streams:
        mine = texts[stream::num_streams]
    else:
        mine = [shard[(stream - f) % num_streams :: num_streams] for f, shard in enumerate(texts)]
    tokens: list[int] = []
    epoch = 0
    while len(tokens) < num_rows * T + K * T + 1:
        for i in permute_places(np.arange(len(mine)), len(mine), SEED, SHARD_ORDER, 0, stream, epoch):
            for text in mine[i]:
                tokens += [*TOKENIZER.encode(text), TOKENIZER.separator_id]
        epoch += 1
    rows = [tokens[i * T : i * T + T + 1] for i in range(num_rows + K)]
    shuffled = []
    for block in range(num_rows // K + 1):
        turn = permute_places(np.arange(K), K, SEED, ROW_ORDER, 0, stream, block)
        shuffled += [rows[block * K + i] for i in turn if block * K + i < len(rows)]
    return shuffled[:num_rows]


@pytest.mark.parametrize(("num_shards", "num_documents"), [(12, 5), (31, 4), (2, 40), (1, 30), (11, 6)])
@pytest.mark.parametrize("world", [1, 3])
def test_the_sequence_is_its_definition(make: Make, num_shards: int, num_documents: int, world: int):
    prepared, data = make((num_shards, num_documents))
    texts = corpus(num_shards, num_documents, "a")
    expected = [by_definition(texts, stream, V, 40) for stream in range(V)]
    ranks = World(prepared, world, data)
    for step in range(40):  # B == V: each stream gives one row a step
        assert sorted(ranks.rows()) == sorted(rows[step] for rows in expected)
        ranks.step()
    ranks.close()


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LIVES, st.sampled_from([((12, 5),), ((3, 20),), ((13, 3), (2, 20))]), st.sampled_from([12, 6]))
def test_kills_and_other_worlds_neither_repeat_nor_skip(
    make: Make, lives: list[tuple[int, int]], shapes: tuple[tuple[int, int], ...], num_streams: int
):
    """Each life runs some steps on its world, takes one more step's rows and is killed before it has used them."""
    lives = [(world, num) for world, num in lives if num_streams % world == 0]
    prepared, data = make(*shapes, num_streams=num_streams)
    weights = {f"s{i}": i + 0.5 for i in range(len(shapes))}
    reference = World(prepared, 1, data, weights=weights)
    state = ""
    for world, num_steps in lives:
        ranks = World(prepared, world, data, weights=weights)
        if state:
            ranks.load(state)
        assert (ranks.steps(num_steps) == reference.steps(num_steps)).all()
        state = ranks.state()
        ranks.rows()
        ranks.close()
        assert json.loads(state) == json.loads(reference.state())
    reference.close()


@pytest.mark.parametrize(("num_shards", "num_documents"), [(12, 5), (29, 3), (2, 40)])
def test_streams_share_the_documents_out(make: Make, num_shards: int, num_documents: int):
    """In the first epoch every document comes once, whichever stream it is in; then the counters stand still."""
    prepared, data = make((num_shards, num_documents))
    ranks = World(prepared, 2, data)
    (loader, _) = ranks.ranks
    num_all = num_shards * num_documents
    seen = []
    while loader.unique_documents < num_all:
        ranks.step()
        seen.append(loader.unique_documents)
        assert len(seen) < 500
    ranks.steps(30)
    assert loader.unique_documents == num_all == max(seen)
    assert loader.repeat_factor > 1
    ranks.close()


def test_no_token_is_lost_between_blocks_rows_and_epochs(make: Make):
    """The inputs of all rows of a stream, put in order, are its documents, epoch after epoch."""
    prepared, data = make((1, 30), num_streams=1)
    ranks = World(prepared, 1, data)
    (loader,) = ranks.ranks
    tokens = {}
    for _ in range(60):
        wanted, *_ = loader._next
        rows = loader._row_source.rows(wanted)
        for row, ids in zip(rows.row_ids.tolist(), rows.ids.tolist(), strict=True):
            tokens[row] = ids[:T]
        ranks.step()
    whole = 60 * B // K * K
    found = [token for row in range(whole) for token in tokens[row]]
    epoch = [t for text in corpus(1, 30, "a")[0] for t in [*TOKENIZER.encode(text), TOKENIZER.separator_id]]
    assert len(found) > 1.5 * len(epoch)
    assert found == (epoch * 3)[: len(found)]
    ranks.close()


def test_held_out_documents_are_never_trained_on(make: Make):
    prepared, data = make((12, 9), validation_share=0.3)
    names = [f"{shard:03}.jsonl:{line}" for shard in range(12) for line in range(1, 10)]
    kept = [name for name in names if not is_held_out(name, 0.3)]
    ranks = World(prepared, 1, data)
    ranks.steps(200)
    assert ranks.ranks[0].unique_documents == len(kept) < 12 * 9
    ranks.close()


def test_bad_records_are_counted_once_and_too_many_stop_the_run(tmp_path: Path):
    folder = write(tmp_path / "c", corpus(12, 6, "a"))
    with (folder / "004.jsonl").open("a") as file:
        file.write('{"text": 1}\n{"text": ""}\n{"no": 1}\nnot json\n')  # an empty one is not bad
    folders = {"s0": folder}
    ranks = World(streamed(folders, V), 2, section(folders, max_bad_records=3))
    ranks.steps(120)  # several epochs
    assert ranks.ranks[0].bad_records == 3
    state = ranks.state()
    again = World(streamed(folders, V), 1, section(folders, max_bad_records=3))
    again.load(state)
    again.steps(1)
    assert again.ranks[0].bad_records == 3
    for world in (ranks, again):
        world.close()
    few = World(streamed(folders, V), 1, section(folders, max_bad_records=2))
    with pytest.raises(UserError, match="more than 2 records of a stream are bad; the last one: the line is not JSON"):
        few.steps(120)
    few.close()


def test_a_stream_without_a_document_is_refused(make: Make):
    prepared, data = make((1, 7))
    ranks = World(prepared, 1, data)
    with pytest.raises(UserError, match="stream 7 of the source 's0' has no document to train on"):
        ranks.step()
    ranks.close()


def test_a_source_that_the_mix_leaves_out_is_not_read(make: Make):
    prepared, data = make((12, 5), (2, 40))
    ranks = World(prepared, 1, data, weights={"s0": 1.0, "s1": 1.0})
    ranks.steps(3, {"s0": 1.0})
    row_source: Any = ranks.ranks[0]._row_source
    assert {source for source, _ in row_source._streams} == {0}
    ranks.steps(3)
    assert {source for source, _ in row_source._streams} == {0, 1}
    ranks.close()


def test_ready_does_not_wait_longer_than_it_may(make: Make):
    prepared, data = make((12, 5))
    (loader,) = World(prepared, 1, data).ranks
    for _ in range(100):
        if loader.wait_until_ready(0.2):
            break
    assert loader.wait_until_ready(0)
    loader.fetch_step_rows()
    loader.close()


@pytest.mark.parametrize(("num_shards", "num_streams"), [(12, 4), (13, 4), (3, 4), (1, 1), (4, 4)])
def test_shards_are_dealt_to_one_stream_each_and_records_too(make: Make, num_shards: int, num_streams: int):
    prepared, _ = make((num_shards, 5), num_streams=num_streams)
    (shards,) = prepared.shards
    stride = 1 if num_shards >= num_streams else num_streams
    found = [
        (shard.name, record)
        for stream in range(num_streams)
        for shard, first in deal_shards(shards, stream, num_streams)
        for record in range(first, 20, stride)
    ]
    assert sorted(found) == sorted((shard.name, record) for shard in shards for record in range(20))
