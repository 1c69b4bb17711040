"""Files that are whole or absent, and tensors that bring no code with them."""

import collections
import hashlib
import json
import os
import pickle
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from smoltrain import files
from smoltrain.errors import TrainingStopped, UserError

# ---- writing


@pytest.mark.parametrize("old", [None, "the old text"])
def test_an_interrupted_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str | None
) -> None:
    path = tmp_path / "file"
    if old is not None:
        path.write_text(old, encoding="utf-8")

    def full(_handle: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_text_file(path, "the new text")
    assert (path.read_text(encoding="utf-8") if path.exists() else None) == old
    assert [p.name for p in tmp_path.iterdir()] == ["file"] * (old is not None), "nor anything beside it"
    monkeypatch.undo()
    files.write_text_file(path, "the new text")
    assert path.read_text(encoding="utf-8") == "the new text"
    assert [p.name for p in tmp_path.iterdir()] == ["file"], "no temporary file stays behind"


def test_the_content_is_on_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "file", []
    real = os.fsync

    def record(handle: int) -> None:
        seen.append((Path(f"/proc/self/fd/{handle}").readlink().name, path.exists()))
        real(handle)

    monkeypatch.setattr(os, "fsync", record)
    files.write_text_file(path, "text")
    assert seen == [("file.tmp", False), (tmp_path.name, True)]


def test_text_and_json_are_utf_8(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None], "a": "Ä\u2028\n\x00"}
    files.write_json_file(tmp_path / "value.json", value)
    text = (tmp_path / "value.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert list(json.loads(text)) == ["b", "a"]
    assert text.endswith("}\n")
    files.write_text_file(tmp_path / "text", "Ä→\n")
    assert (tmp_path / "text").read_bytes() == "Ä→\n".encode()


@pytest.mark.parametrize("size", [0, 1, 1 << 20])
def test_sha256_is_hashlibs(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    assert files.file_sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


# ---- reading tensors


class Plain:
    """A harmless class, and still one that a file may only hold if the reader allows it."""

    def __init__(self, value: int) -> None:
        self.value = value


class Calls:
    """Its pickle calls a function when it is read."""

    def __init__(self, function: Any, argument: Any) -> None:
        self.call = function, argument

    def __reduce__(self) -> Any:
        function, argument = self.call
        return function, (argument,)


def saved(tmp_path: Path, value: Any) -> Path:
    path = tmp_path / "tensors.pt"
    torch.save(value, path)
    return path


def test_tensors_and_plain_containers_come_back(tmp_path: Path) -> None:
    shared = torch.randn(3, 4)
    value = {
        "list": [1, 2.5, "text", None, True, b"bytes"],
        "tuple": (shared, shared[0]),
        "ordered": collections.OrderedDict(a=torch.arange(5)),
        "types": [torch.zeros(2, dtype=t) for t in (torch.bfloat16, torch.float16, torch.int64, torch.bool)],
        "nan": torch.tensor([float("nan"), float("inf")]),
    }
    back = files.read_tensors(saved(tmp_path, value))
    assert list(back) == list(value)
    assert back["list"] == value["list"]
    assert torch.equal(back["tuple"][0], shared)
    assert torch.equal(back["tuple"][1], shared[0])
    assert torch.equal(back["ordered"]["a"], torch.arange(5))
    for ours, theirs in zip(back["types"], value["types"], strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    assert torch.equal(back["nan"].isnan(), value["nan"].isnan())


@pytest.mark.parametrize("function", [os.system, exec, eval, subprocess.check_call, os.mkdir])
def test_a_file_that_would_run_code_is_refused_by_name_and_runs_nothing(tmp_path: Path, function: Any) -> None:
    marker = tmp_path / "marker"
    argument = {os.system: f"touch {marker}", subprocess.check_call: ["touch", str(marker)], os.mkdir: str(marker)}.get(
        function, f"__import__('os').mkdir({str(marker)!r})"
    )
    path = saved(tmp_path, {"weights": torch.ones(2), "more": Calls(function, argument)})
    with pytest.raises(TrainingStopped) as caught:
        files.read_tensors(path, allowed=(Plain,))
    assert str(path) in str(caught.value)
    assert re.search(rf" is refused: (.*\.)?{function.__name__}$", str(caught.value))
    assert "\n" not in str(caught.value)
    assert "add_safe_globals" not in str(caught.value), "nobody should be told how to let it in"
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the file must be dangerous, or refusing it proves nothing"


def test_a_bare_pickle_is_refused_too(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    path = tmp_path / "tensors.pt"
    path.write_bytes(pickle.dumps(Calls(os.system, f"touch {marker}"), protocol=2))
    with pytest.raises(TrainingStopped, match=r"tensors\.pt holds more than tensors and is refused: posix\.system"):
        files.read_tensors(path)
    assert not marker.exists()


def test_what_would_be_refused_later_is_not_written(tmp_path: Path) -> None:
    """As the members of an enum, which some Pythons write as a call of getattr."""
    tree = {"tensor": torch.ones(2), "object": Plain(7)}
    files.write_tensors(tmp_path / "good.pt", tree, (Plain,))
    assert files.read_tensors(tmp_path / "good.pt", (Plain,))["object"].value == 7
    for value in (Plain(7), Calls(getattr, "x")):
        with pytest.raises(TypeError, match=r"bad\.pt would hold more than tensors: .*(Plain|getattr)$"):
            files.write_tensors(tmp_path / "bad.pt", {"object": value})


def test_a_class_loads_only_where_it_is_allowed(tmp_path: Path) -> None:
    path = saved(tmp_path, {"object": Plain(7)})
    assert files.read_tensors(path, allowed=(Plain,))["object"].value == 7
    with pytest.raises(TrainingStopped, match=rf"^{path} .* refused: {Plain.__module__}\.Plain$"):
        files.read_tensors(path)
    assert Plain not in torch.serialization.get_safe_globals(), "what was allowed once is not allowed for ever"


def test_a_broken_file_is_a_readable_error(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": torch.arange(1000)})
    whole = path.read_bytes()
    for length in (0, 1, 3, 100, 1000, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(TrainingStopped) as caught:
            files.read_tensors(path)
        assert str(caught.value).startswith(f"{path} is broken and cannot be read: ")
        assert "\n" not in str(caught.value)
    path.write_text("hello world", encoding="utf-8")
    with pytest.raises(TrainingStopped, match="is broken and cannot be read"):
        files.read_tensors(path)
    path.unlink()
    with pytest.raises(TrainingStopped, match="No such file"):
        files.read_tensors(path)


# ---- lines


def test_json_lines_are_all_but_one_that_a_crash_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert list(files.read_jsonl(path)) == []
    path.write_bytes(b'{"step": 1}\n{"step": 2, "text": "\xff"}\n{"step": 3}')
    assert list(files.read_jsonl(path)) == [{"step": 1}], "a line that is not UTF-8 is damaged"


# ---- names that come out of files


@pytest.mark.parametrize("name", ["..", "../x", "a/../../x", "/etc/passwd", "", "a\x00b", "out/x", "out", "loop"])
def test_no_name_leads_out_of_its_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "out").symlink_to(tmp_path)
    (folder / "loop").symlink_to("../loop")
    with pytest.raises(UserError, match=r"a name leads out of its folder: .* change the list"):
        files.resolve_inside(folder, name, "the list")


@pytest.mark.parametrize("name", ["x", "a/b.bin", "..x", "link/x", "not there/yet"])
def test_a_name_within_its_folder_is_followed(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder" / "real").mkdir(parents=True)
    (tmp_path / "folder" / "link").symlink_to("real")
    (tmp_path / "another").symlink_to("folder")  # the folder itself may be a link: its user named it
    for folder in (tmp_path / "folder", tmp_path / "another"):
        assert files.resolve_inside(folder, name, "the list") == folder / name


def test_only_a_regular_file_is_hashed_or_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for read in (files.file_sha256, files.read_text_file):
        for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
            with pytest.raises(OSError, match="no regular file"):
                read(path)


def test_a_full_disk_is_told_with_the_name_of_the_file():
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"), files.name_file(Path("/dev/full")):
        Path("/dev/full").write_text("x")  # write(2) itself names no file
    with pytest.raises(FileNotFoundError, match="'/nowhere'"), files.name_file(Path("/dev/full")):
        Path("/nowhere").read_text()
