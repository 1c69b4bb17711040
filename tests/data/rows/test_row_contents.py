"""Which documents a row holds: each token is of the document that is named, in either mode, on any world."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from smoltrain.config.schema import Config
from smoltrain.data.documents.held_out import is_held_out
from smoltrain.data.rows.loader import Loader
from smoltrain.data.rows.open_loader import open_loader
from smoltrain.data.rows.row_contents import RowContents
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.data.tokens.token_files import content_hash
from tests import tiny
from tests.data.tokens.test_index import as_format_2
from tests.data.tokens.test_prepare import config, on_hub, twelve
from tests.data.worlds import TOKENIZER, T, World, cached, section, streamed, write

V = 6  # streams
SHARDS = [
    [f"<{s}.{d}>" + "xyz"[d % 3] * (7 * (s + 3 * d) % 31 + (60 if d == 3 else 0)) for d in range(8)] for s in range(7)
]


def rows_by_position(world: World, steps: int) -> dict[int, tuple[RowContents, list[int]]]:
    """Each row of the next steps, named, and its T inputs."""
    found = {}
    for _ in range(steps):
        for loader in world.ranks:
            ids = [row for batch in loader.fetch_step_rows().micro_batches for row in batch.ids_BT.tolist()]
            found |= {row.position: (row, own) for row, own in zip(loader.hold_rows()(), ids, strict=True)}
        world.step()
    return found


def assert_covered(row: RowContents) -> None:
    borders = [(passage.first, passage.last) for passage in row.passages]
    assert borders[0][0] == 0
    assert borders[-1][1] == T
    assert all(before[1] == after[0] for before, after in itertools.pairwise(borders))
    assert all(first < last for first, last in borders)


@pytest.mark.parametrize("num_shards", [7, 2])  # 2: each stream reads its share of every shard
def test_rows_of_streams_name_shard_and_record(tmp_path: Path, num_shards: int) -> None:
    folders = {"s0": write(tmp_path / "c", SHARDS[:num_shards])}
    world = World(streamed(folders, V), 2, section(folders))
    named = rows_by_position(world, 12)  # more than an epoch of some streams
    world.close()
    for row, ids in named.values():
        assert_covered(row)
        for number, passage in enumerate(row.passages):
            shard, _, record = passage.address.partition(".jsonl:")
            document = [*TOKENIZER.encode(SHARDS[int(shard)][int(record) - 1]), TOKENIZER.separator_id]
            own = ids[passage.first : passage.last]
            begins = [i for i in range(len(document)) if document[i : i + len(own)] == own]
            assert begins, "all of the tokens are of this document"
            if number:
                assert begins[0] == 0, "only the row's first document can have begun before it"
            if number < len(row.passages) - 1:
                assert own[-1] == TOKENIZER.separator_id, "only the last one can go on behind it"


def test_the_names_do_not_depend_on_the_world_or_on_a_restart(tmp_path: Path) -> None:
    folders = {"s0": write(tmp_path / "c", SHARDS), "s1": write(tmp_path / "d", SHARDS[:2])}
    prepared, about = streamed(folders, V), section(folders)
    one, three = World(prepared, 1, about), World(prepared, 3, about)
    undisturbed = rows_by_position(one, 9)
    before = rows_by_position(three, 4)
    six = World(prepared, 6, about)
    six.load(three.state())
    after = rows_by_position(six, 5)
    for world in (one, three, six):
        world.close()
    assert {position: row for position, (row, _) in (before | after).items()} == {
        position: row for position, (row, _) in undisturbed.items()
    }
    assert {row.source for row, _ in undisturbed.values()} == {"s0", "s1"}


def test_rows_of_tokens_that_lie_ready_name_documents_by_number() -> None:
    """Tokens are their own places there, and every sixth begins a document."""
    world = World(cached(40, 30), 2)
    for row, ids in rows_by_position(world, 10).values():
        assert_covered(row)
        first = 1 + 1000 * int(row.source[1])
        for passage in row.passages:
            assert {(i - first) // 6 for i in ids[passage.first : passage.last]} == {passage.number}


def loader_of(settings: Config) -> Loader:
    prepare_run_data(settings)
    return open_loader(settings, 0, 1, rows_per_step=4, accumulation=2)


def an_epoch(loader: Loader) -> list[RowContents]:
    rows = []
    while (loader.epochs or 0) < 1:
        taken = loader.fetch_step_rows()
        rows += loader.hold_rows()()
        loader.mark_consumed(loader.unpack_totals(taken.counts))
    return rows


def test_a_document_of_files_has_an_address(tmp_path: Path) -> None:
    loader = loader_of(tiny.load(tmp_path))
    found = an_epoch(loader)
    named = {passage.address for row in found for passage in row.passages}
    assert named == {path.name for path in (tmp_path / "corpus").iterdir() if not is_held_out(path.name, 0.2)}
    for row in found:
        for number, passage in enumerate(row.passages):
            text = (tmp_path / "corpus" / passage.address).read_text()
            assert passage.text in text
            assert not number or text.startswith(passage.text)
    assert str(found[0]) == f"row 0 of 'data' ({found[0].passages[0].address} {found[0].passages[0].text!r})"


def test_so_has_one_of_many_in_a_file_with_bad_and_held_out_ones_between(tmp_path: Path) -> None:
    texts = [f"document {n}: " + "to be or not to be " * (n % 5) for n in range(200)]
    lines = [json.dumps({"text": text}) for text in texts]
    lines[3], lines[50], lines[51] = "{", "", json.dumps({"text": None})
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    loader = loader_of(tiny.load(tmp_path, f"data.path={tmp_path / 'lines.jsonl'}"))
    found = an_epoch(loader)
    for row in found:
        for number, passage in enumerate(row.passages):
            name, _, line = passage.address.partition(":")
            text = texts[int(line) - 1]
            assert name == "lines.jsonl"
            assert passage.text in text
            assert not number or text.startswith(passage.text)
    assert len({passage.number for row in found for passage in row.passages}) > 100


def test_where_the_held_out_side_is_the_tail_no_document_is_left_out(tmp_path: Path) -> None:
    name = next(f"{i}.txt" for i in range(99) if is_held_out(f"{i}.txt", 0.2))  # by its name it would be held out
    (tmp_path / name).write_text("once more unto the breach, dear friends, " * 60)
    loader = loader_of(tiny.load(tmp_path, f"data.path={tmp_path / name}"))
    assert loader.prepared.index.sources["data"].held_out == "tail"
    assert {p.address for row in an_epoch(loader) for p in row.passages} == {name}


@pytest.mark.parametrize("how", ["changed", "gone"])
def test_the_address_is_that_of_the_first_start(tmp_path: Path, how: str) -> None:
    settings = tiny.load(tmp_path)
    before = an_epoch(loader_of(settings))
    for path in (tmp_path / "corpus").iterdir():
        path.write_text(path.read_text().swapcase()) if how == "changed" else path.unlink()
    assert an_epoch(open_loader(settings, 0, 1, rows_per_step=4, accumulation=2)) == before


def test_data_of_the_format_before_name_documents_by_number_alone(tmp_path: Path) -> None:
    settings = tiny.load(tmp_path)
    rows = an_epoch(loader_of(settings))
    as_format_2(settings)
    before = an_epoch(loader_of(settings))
    assert [replace_addresses(row) for row in rows] == before
    numbers = {passage.number for row in before for passage in row.passages}
    assert len(numbers) > 5
    shown = next(row for row in before if row.passages[0].number == 5)
    assert f"(training document 5 {shown.passages[0].text!r}" in str(shown)


def replace_addresses(row: RowContents) -> RowContents:
    return replace(row, passages=tuple(replace(passage, address="") for passage in row.passages))


def test_documents_of_the_hub_have_addresses_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = twelve(tmp_path)
    on_hub(root, monkeypatch)
    (train,) = prepare_run_data(config(root, "cached", data__path=None, data__hub="me/texts")).train
    for number, hashed in enumerate(train.hashes.tolist()):
        name, _, line = train.document_address(number).partition(":")
        text = json.loads((root / "source" / name).read_text().splitlines()[int(line) - 1])["text"]
        assert content_hash(text) == hashed
