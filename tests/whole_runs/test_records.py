"""Every .jsonl of a run has one writer and one reader: any text comes back, any damage is one line that names it."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoltrain import files
from smoltrain.cli import main
from smoltrain.data.documents.bad_records import BAD_RECORDS_FILE
from smoltrain.errors import BAD_INPUT, FAULT, UserError
from smoltrain.run.row_ledger import LEDGER_FILE, verify_ledgers
from smoltrain.run.run_folder import SPIKES_FILE
from smoltrain.run.track import Tracker
from smoltrain.run.verify import _find_damaged_records
from smoltrain.training.spikes import read_spikes
from tests import tiny

BREAKS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"  # where str.splitlines ends a line


def write(path: Path, *values: dict[str, Any]) -> Path:
    path.write_text("".join(map(files.format_json_line, values)), encoding="utf-8")
    return path


def step(n: int, **more: Any) -> dict[str, Any]:
    return {"step": n, "train/loss_nats_per_token": 5.0 - n / 10, "data/rows": 4 * n, "data/ledger": "x" * 64} | more


@given(st.lists(st.text(st.characters() | st.sampled_from(BREAKS)), max_size=4))
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    values = [{"step": n, "text": text} for n, text in enumerate(texts)]
    assert list(files.read_jsonl(write(path, *values))) == values
    assert path.read_bytes().isascii()
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == texts, "to any other reader too"


def test_numbers_that_are_not_finite_come_back(tmp_path: Path) -> None:
    (line,) = files.read_jsonl(write(tmp_path / "a.jsonl", {"step": 1, "a": math.inf, "b": -math.inf, "c": math.nan}))
    assert (line["a"], line["b"], math.isnan(line["c"])) == (math.inf, -math.inf, True)


@pytest.mark.parametrize("mark", BREAKS)
def test_lines_of_older_versions_end_at_newlines_alone(tmp_path: Path, mark: str) -> None:
    values = [{"step": 1, "text": f"a{mark}b"}, {"step": 2, "text": mark}]
    text = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    assert list(files.read_jsonl(tmp_path / "a.jsonl")) == values


def test_every_flip_of_every_bit_is_seen(tmp_path: Path) -> None:
    """But for the key of the first line's checksum, without which it is a line of an older version."""
    whole = write(tmp_path / "a.jsonl", step(1), step(2), step(3)).read_bytes()
    first = whole.index(files.CRC32_MARK.encode())
    key = range(first, first + len(files.CRC32_MARK))
    for place in range(len(whole)):
        for bit in range(8):
            content = bytearray(whole)
            content[place] ^= 1 << bit
            (tmp_path / "a.jsonl").write_bytes(content)
            lines = list(files.read_jsonl_lines(tmp_path / "a.jsonl"))
            assert any(line.fault for line in lines) or place in key, (place, bit)


def test_a_line_that_a_crash_cut_short_never_was(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.jsonl", step(1), step(2)).read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(first, len(whole)):
        (tmp_path / "a.jsonl").write_bytes(whole[:length])
        assert [(line.number, line.fault) for line in files.read_jsonl_lines(tmp_path / "a.jsonl")] == [(1, None)]


DAMAGED = {
    "not JSON": b'{"step": \n',
    "another value": files.format_json_line(step(2)).replace("8", "9", 1).encode(),
    "no checksum": b'{"step": 2}\n',
    "no step": files.format_json_line({"place": 2}).encode(),
    "a step in words": files.format_json_line({"step": "two"}).encode(),
    "a list": b"[1, 2]\n",
    "nested": b"[" * 100_000 + b"\n",
    "not UTF-8": b'{"step": 2, "a": "\xff"}\n',
    "zeros": bytes(30) + b"\n",
    "empty": b"\n",
}


@pytest.fixture(params=DAMAGED.values(), ids=list(DAMAGED))
def metrics(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The metrics of a run whose second line is damaged."""
    settings = tiny.load(tmp_path)
    settings.run_folder.mkdir(parents=True)
    path = settings.run_folder / "metrics.jsonl"
    lines = [files.format_json_line(step(n)).encode() for n in (1, 3)]
    path.write_bytes(lines[0] + request.param + lines[1])
    return path


def test_who_draws_or_tells_leaves_a_damaged_line_out_and_says_so(
    metrics: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [line["step"] for line in files.read_jsonl(metrics)] == [1, 3]
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"WARNING: {metrics}, line 2 is damaged (")
    assert said.endswith("; left out")


def test_a_resume_sets_a_damaged_line_aside_and_says_so(
    tmp_path: Path, metrics: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = metrics.read_bytes().split(b"\n")[1]
    settings = tiny.load(tmp_path)
    Tracker(settings, tiny.run_folder(settings.run_folder), 0, 2, 12).close(0)
    said = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    assert [line["step"] for line in files.read_jsonl(metrics)] == [1]
    assert metrics.with_name("metrics.damaged").read_bytes() == damaged + b"\n"
    assert len(said) == 2
    assert said[1].startswith("WARNING: the start before was killed at step 3, and nothing later than step 2 was saved")
    assert said[0].startswith(f"WARNING: {metrics}, line 2 is damaged (")


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_journal_of_spikes_refuses_the_start(tmp_path: Path, line: bytes) -> None:
    first = files.format_json_line({"step": 1, "does": "rewind", "rows": [0, 4]}).encode()
    (tmp_path / SPIKES_FILE).write_bytes(first + line)
    with pytest.raises(UserError, match=r"spikes\.jsonl, line 2 is damaged \(") as caught:
        read_spikes(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    assert (tmp_path / SPIKES_FILE).read_bytes() == first + line


@pytest.mark.parametrize("mark", BREAKS)
def test_a_journal_of_an_older_version_with_any_line_break_is_read(tmp_path: Path, mark: str) -> None:
    entry = {"step": 1, "does": "rewind", "rows": [0, 4], "worst_first": [{"text": f"a{mark}b"}]}
    (tmp_path / SPIKES_FILE).write_text(json.dumps(entry, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_spikes(tmp_path) == [entry]


RECORDS = {
    "metrics.undone.jsonl": step(1),
    "samples.jsonl": {"step": 1, "prompt": "a", "text": "b"},
    SPIKES_FILE: {"step": 1, "does": "skip", "rows": [0, 4]},
    f"data/{BAD_RECORDS_FILE}": {"source": "data", "place": "a.txt", "why": "it is empty"},
}


@pytest.mark.parametrize("name", RECORDS)
def test_verify_names_each_damaged_record(tmp_path: Path, name: str) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / name, RECORDS[name], RECORDS[name])
    assert _find_damaged_records(tmp_path) == []
    content = bytearray((tmp_path / name).read_bytes())
    content[random.Random(0).randrange(len(content) // 2 + 5, len(content) - 1)] ^= 4
    (tmp_path / name).write_bytes(content)
    (said,) = _find_damaged_records(tmp_path)
    assert said == f"{tmp_path / name}, line 2 is damaged (its checksum differs)"


def test_verify_of_a_run_with_damaged_metrics_ends_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("provenance: {rows_per_step: 4, wandb_id: a, starts: []}\n")
    (tmp_path / LEDGER_FILE).write_bytes(bytes(range(1, 65)))
    write(tmp_path / "metrics.jsonl", step(1), step(2))
    content = (tmp_path / "metrics.jsonl").read_bytes().replace(b"4.9", b"4.1", 1)
    (tmp_path / "metrics.jsonl").write_bytes(content)
    assert not verify_ledgers([tmp_path])
    assert f"{tmp_path / 'metrics.jsonl'}, line 1 is damaged (its checksum differs)" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["plot", "summary"])
@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to(path)], ids=["folder", "link to itself"])
def test_records_that_are_no_file_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], None], verb: str
) -> None:
    from smoltrain.config.load import config_to_yaml

    settings = tiny.load(tmp_path)
    settings.run_folder.mkdir(parents=True)
    (settings.run_folder / "config.yaml").write_text(config_to_yaml(settings))
    make(settings.run_folder / "metrics.jsonl")
    with pytest.raises(SystemExit) as left:
        main([verb, str(settings.run_folder)])
    assert left.value.code == BAD_INPUT != FAULT
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ")
