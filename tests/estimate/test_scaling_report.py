"""The verb with several worlds: table, sentences, picture, and errors of one line."""

from pathlib import Path

import pytest

from tests.estimate.setups import SMOL
from tests.estimate.test_estimate import run
from tests.estimate.test_scaling import FIXED, GROWING

PNG = b"\x89PNG"
PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"


def read_rows(out: str) -> dict[str, list[str]]:
    """The table's lines by their number of ranks."""
    return {line.split()[0]: line.split() for line in out.splitlines() if line[:6].strip().replace(",", "").isdigit()}


def test_several_worlds_are_a_table_a_picture_and_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    picture = tmp_path / "new" / "scaling.png"
    assert not run(
        SMOL, *GROWING, "--world", "8,64,1024", "--device", "h100", "--between", "25gbit", "--plot", str(picture)
    )
    out = capsys.readouterr().out
    said = " ".join(out.split())
    rows = read_rows(out)
    assert "…" not in out, "no number is cut"
    assert set(rows) == {"8", "64", "1,024"}
    assert rows["8"][1:3] == ["1", "128"]
    assert len(rows["8"]) == 7, "on one node no cadence"
    assert rows["1,024"][1:3] == ["128", "16,384"]
    assert len(rows["1,024"]) == 9
    assert "between nodes 2.81 GB/s and 9.6 us a node (--between)" in said
    assert "it stops to pay beyond 8 ranks: those added after them bring less than 50% of what one does on 8" in said
    assert "the rows of a step grow with the ranks" in said
    assert "a node fails every 6,335 hours (--node-mtbf;" in said
    assert picture.read_bytes().startswith(PNG)


def test_what_is_left_out_is_said_and_one_world_of_several_nodes_says_its_failures(capsys: pytest.CaptureFixture[str]):
    assert not run(SMOL, *FIXED, "--world", "8,12,20", "--device", "h100")
    said = " ".join(capsys.readouterr().out.split())
    assert "left out: 20 ranks: the rows per step do not divide evenly" in said
    assert "it pays up to 12 ranks, the most of the table" in said
    assert "fit" not in said
    words = ("batch.sequence_length=8192", "batch.micro_batch=32", "--world", "1,2", "--device", "l4")
    assert not run(SMOL, "batch.rows_per_step=64", *words)
    assert "does not fit the memory of a rank: on 1, 2 ranks" in " ".join(capsys.readouterr().out.split())
    assert not run(SMOL, *GROWING, "--world", "16", "--device", "h100", "--node-mtbf", "100")
    said = " ".join(capsys.readouterr().out.split())
    assert "134,515,008 parameters on 16 x h100" in said
    assert "a node fails every 100 hours" in said
    assert "pay" not in said
    assert not run(SMOL, *GROWING, "--world", "8", "--device", "h100")
    assert "fails every" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--world", "some"), "no such worlds: saw 'some'"),
        (("--world", "16", "--device", "h100", "--between", "fast"), "no such link: saw 'fast'"),
        (("--world", "8", "--plot", "x.png"), "--plot draws several worlds: saw 8"),
        (("--world", "8,16", "--device", "h100", "--measure"), "--measure looks at one world: saw 2 of them"),
    ],
)
def test_what_cannot_be_is_one_line(words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]):
    assert run("quickstart", *words) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def test_the_page_shows_what_the_verb_prints(capsys: pytest.CaptureFixture[str]):
    words = ("batch.rows_per_step=4096", "batch.sequence_length=2048", "batch.micro_batch=4")
    assert not run(SMOL, *words, "--world", "8..1024", "--device", "h100")
    printed = {ranks: [*row[:2], *row[3:]] for ranks, row in read_rows(capsys.readouterr().out).items()}  # without rows
    starts = tuple(f"| {ranks} |" for ranks in printed)
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(starts)]
    assert len(lines) == 5
    for line in lines:
        shown = line.replace(" %", "%").replace("|", " ").split()
        assert shown == printed[shown[0]]
