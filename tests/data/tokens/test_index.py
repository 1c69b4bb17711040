"""An index is believed in nothing before it was checked: damaged anywhere, or poisoned, it is one readable line."""

import copy
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from smoltrain.config.schema import Config
from smoltrain.data.tokens import tokenise
from smoltrain.data.tokens.index import INDEX_DIGEST_KEY, data_index_file, read_data_index, write_data_index
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.data.tokens.token_parts import TokenPart, load_whole_part
from smoltrain.errors import UserError
from tests.data.tokens.test_prepare import config, twelve
from tests.data.tokens.test_tokenise import contents, problem

GONE = object()
NEW = (INDEX_DIGEST_KEY, "tokenizer_files")  # which an older index has not
VALUES = (None, -1, 0, 1, 10**30, 1.5, True, "x", "../..", "/etc", "uint32", "stream", "cached", [], {}, [[1]], GONE)


@pytest.fixture
def root(tmp_path: Path):
    return twelve(tmp_path)


def places(tree: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested containers."""
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield (*above, key)
        yield from places(tree[key], (*above, key))


def changed(tree: dict[str, Any], place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    tree = copy.deepcopy(tree)
    node: Any = tree
    for key in place[:-1]:
        node = node[key]
    if value is GONE:
        del node[place[-1]]
    else:
        node[place[-1]] = value
    return tree


def as_format_2(settings: Config) -> None:
    """Make a run's prepared data what the version before would have left."""
    file = data_index_file(settings.run_folder)
    tree = json.loads(file.read_text())
    for name, source in tree["sources"].items():
        source.pop("repeated", None)
        source.pop("shard_names", None)
        for side in ("train", "validation"):
            side_files = source.get(side, {"files": {}})["files"]
            for file_name in [file_name for file_name in side_files if file_name.endswith(".addresses")]:
                del side_files[file_name]
                (file.parent / name / file_name).unlink(missing_ok=True)
    write_data_index(file, tree | {"format": 2})


def told_of(settings: Config) -> str:
    """What `prepare` says against it; '' if nothing."""
    try:
        prepare_run_data(settings)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("mode", ["cached", "stream", "shared"])
@pytest.mark.parametrize("sealed", [True, False])
def test_every_mutation_is_one_line_or_does_no_harm(root: Path, mode: str, *, sealed: bool):
    """Without its digest, as a stranger would write it, a mutation may pass where it means nothing."""
    shared = {"data__cache": root / "cache"} if mode == "shared" else {}
    settings = config(root, "auto" if shared else mode, **shared)
    prepare_run_data(settings)
    home = next((root / "cache").iterdir()) if shared else settings.run_folder
    file = data_index_file(home)
    whole, before = json.loads(file.read_text()), contents(root / "given")
    draw = random.Random(13)
    for number, place in enumerate(places(whole)):
        for value in draw.sample(VALUES, 2):
            tree = changed(whole, place, value)
            if not sealed:
                tree = {key: kept for key, kept in tree.items() if key not in NEW}
            file.write_text(json.dumps(tree))
            another = {"run__name": f"run{number}-{VALUES.index(value)}"} if shared else {}
            told = told_of(config(root, "auto" if shared else mode, **shared, **another))
            assert told.count("\n") == 0
            assert len(told) < 800
            assert told or not sealed or tree == whole
    assert contents(root / "given") == before


def test_a_flipped_byte_anywhere_is_found(root: Path):
    settings = config(root, "cached")
    prepare_run_data(settings)
    file = data_index_file(settings.run_folder)
    raw = file.read_bytes()
    for place in range(0, len(raw), 41):
        damaged = bytearray(raw)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        try:
            same = json.loads(damaged.decode()) == json.loads(raw)  # white space says nothing
        except ValueError:
            same = False
        if same:
            continue
        with pytest.raises(UserError) as caught:
            read_data_index(file)
        assert len(str(caught.value).splitlines()) == 1


def test_an_index_that_is_a_folder(root: Path):
    settings = config(root, "cached")
    data_index_file(settings.run_folder).mkdir(parents=True)
    assert "the index of the data is damaged: saw no regular file" in problem(settings)


def test_json_that_is_too_deep_is_damaged(root: Path):
    settings = config(root, "cached")
    prepare_run_data(settings)
    data_index_file(settings.run_folder).write_text('{"format": 2, "why": ' + "[" * 10**5 + "]" * 10**5 + "}")
    assert "the index of the data is damaged: saw RecursionError" in problem(settings)


@pytest.mark.parametrize("name", ["../../precious", "/precious", "..", ".", "", "a/b"])
def test_a_poisoned_cache_deletes_nothing(root: Path, name: str):
    """The first name that a stranger would try: a source whose folder is somebody's own."""
    (root / "precious").mkdir()
    (root / "precious" / "letter.txt").write_text("dear")
    first = config(root, "auto", data__cache=root / "cache")
    prepare_run_data(first)
    file = data_index_file(next((root / "cache").iterdir()))
    tree = json.loads(file.read_text())
    tree["sources"] = {name: tree["sources"]["data"]}
    write_data_index(file, {k: v for k, v in tree.items() if k != INDEX_DIGEST_KEY})
    before = contents(root)
    line = problem(config(root, "auto", run__name="second", data__cache=root / "cache"))
    assert line.startswith("the index of the data is damaged")
    after = contents(root)
    assert {key: after[key] for key in before} == before


@pytest.mark.parametrize("name", ["../../../precious/letter.txt", "/etc/passwd", "train-00000.bin/../x"])
def test_a_poisoned_list_of_files_reads_nothing_elsewhere(root: Path, name: str):
    prepare_run_data(config(root, "auto", data__cache=root / "cache"))
    file = data_index_file(next((root / "cache").iterdir()))
    tree = json.loads(file.read_text())
    held = tree["sources"]["data"]["train"]["files"]
    tree["sources"]["data"]["train"]["files"] = {name: held.pop("train-00000.bin"), **held}
    write_data_index(file, tree)
    assert "the index of the data is damaged" in problem(
        config(root, "auto", run__name="second", data__cache=root / "cache")
    )


@pytest.mark.parametrize("place", ["data", "data/data", "tokenizer", "lock", "data/data/train-00000.bin.partial"])
def test_a_link_in_a_shared_cache_is_refused(root: Path, place: str):
    """It stood there before the first run came: what this run writes or sweeps would be somewhere else."""
    precious = root / "precious"
    precious.mkdir()
    (precious / "letter.txt").write_text("dear")
    settings = config(root, "auto", data__cache=root / "cache")
    prepare_run_data(config(root, "auto", run__name="scout", data__cache=root / "scouted"))
    (scouted,) = (root / "scouted").iterdir()
    link = root / "cache" / scouted.name / place
    link.parent.mkdir(parents=True)
    link.symlink_to(precious / "letter.txt" if "." in place or place == "lock" else precious)
    assert "the cache holds a link" in problem(settings)
    link.unlink()
    (root / "cache" / scouted.name).rename(root / "aside")
    (root / "cache" / scouted.name).symlink_to(precious)
    assert "a name leads out of its folder" in problem(settings)
    assert contents(precious) == {"letter.txt": b"dear"}


def test_a_cache_that_says_it_is_of_other_data_is_refused(root: Path):
    prepare_run_data(config(root, "auto", data__cache=root / "cache"))
    file = data_index_file(next((root / "cache").iterdir()))
    tree = json.loads(file.read_text())
    tree["fingerprint"]["sources"]["data"]["files"]["00.jsonl"]["sha256"] = "0" * 64
    write_data_index(file, tree)
    assert "the cache holds other data" in problem(config(root, "auto", run__name="second", data__cache=root / "cache"))


def test_every_mutation_of_a_parts_record_makes_the_part_anew(root: Path, monkeypatch: pytest.MonkeyPatch):
    """A preparation that was killed has left its parts behind; one of their records is damaged."""
    monkeypatch.setattr(tokenise, "remove_other_files", lambda *_: None)
    settings = config(root, "cached")
    prepare_run_data(settings)
    folder = settings.run_folder / "data"
    record = folder / "data" / "part-00000.json"
    whole = json.loads(record.read_text())
    raw = {path.name: path.read_bytes() for path in (folder / "data").iterdir()}
    part = TokenPart(settings.data.parts[0], 0, (), 0, 0, None, folder / "data", whole["made_of"])
    loaded = load_whole_part(part, 2)
    assert loaded is not None
    assert loaded.to_json() == whole
    for place in places(whole):
        for value in VALUES:
            tree = changed(whole, place, value)
            if tree != whole:
                record.write_text(json.dumps(tree))
                assert load_whole_part(part, 2) is None, (place, value)
    for text in ("", "[" * 10**5, "null", '"x"', "[]"):
        record.write_text(text)
        assert load_whole_part(part, 2) is None
    record.unlink()
    os.mkfifo(record)
    assert load_whole_part(part, 2) is None
    record.unlink()
    data_index_file(settings.run_folder).unlink()
    (folder / "data" / "train-00000.bin").write_bytes(raw["train-00000.bin"][:-2])
    prepare_run_data(settings)
    assert (folder / "data" / "train-00000.bin").read_bytes() == raw["train-00000.bin"]


@pytest.mark.parametrize("mode", ["cached", "stream"])
def test_data_of_the_format_before_are_read_and_repaired(root: Path, mode: str, capsys: pytest.CaptureFixture[str]):
    settings = config(root, mode)
    prepare_run_data(settings)
    as_format_2(settings)
    before = contents(settings.run_folder)
    assert not any(name.endswith(".addresses") for name in before)
    capsys.readouterr()
    prepared = prepare_run_data(settings)
    assert prepared.index.format == 2
    assert capsys.readouterr().out == ""
    for path in settings.run_folder.rglob("validation.starts"):
        path.write_bytes(b"\1" + path.read_bytes()[1:])
    prepare_run_data(settings)
    assert "validation.starts is damaged" in capsys.readouterr().out
    assert contents(settings.run_folder) == before


def test_addresses_that_lead_nowhere_are_not_known(root: Path):
    """An index whose list of shards is shorter than its files say: the rows are read, their documents have numbers."""
    settings = config(root, "cached")
    prepare_run_data(settings)
    file = data_index_file(settings.run_folder)
    tree = json.loads(file.read_text())
    assert tree["sources"]["data"]["shard_names"] == [f"{i:02}.jsonl" for i in range(12)]
    tree["sources"]["data"]["shard_names"] = ["00.jsonl"]
    write_data_index(file, tree)
    (tokens,) = prepare_run_data(settings).train
    addresses = [tokens.document_address(number) for number in range(len(tokens.starts))]
    assert {address.partition(":")[0] for address in addresses} == {"00.jsonl", ""}
