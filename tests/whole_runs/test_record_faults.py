"""One bit of a run's own records is turned over, and the run goes on: nobody is misled, or somebody is told.

Each trial is a real resume. It is refused with a line that names the file, or ends with the weights, rows and losses
of the run that nobody harmed; and what was harmed is said at the start or by `verify`, unless nothing depends on it.
"""

import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from smoltrain import files
from smoltrain.checkpoint.manifest import LAST_SAVED_FILE, step_folder
from smoltrain.config.config_file import CONFIG_FILE
from smoltrain.errors import BAD_INPUT, DONE
from smoltrain.run.row_ledger import LEDGER_FILE
from smoltrain.run.run_folder import SPIKES_FILE
from smoltrain.run.verify import verify_run
from tests import tiny
from tests.whole_runs.test_crash import numbers, same_bits, tensors
from tests.zygote import zygote

SETTINGS = ("model.dropout=0.1", "phases.main.steps=4", "phases.continuation.steps=2", "checkpoint.every=2")
LAST = 6
FLIPS = 12
HARMED = ("metrics.jsonl", "samples.jsonl", SPIKES_FILE, CONFIG_FILE, LEDGER_FILE, LAST_SAVED_FILE)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one rank that stopped behind its checkpoints of steps 2 and 4; it has met a spike."""
    folder = tmp_path_factory.mktemp("original")
    life = zygote().train(words(folder, "run.stop_after=main"), 1, folder / "log")
    assert life.end() == [DONE], life.text()
    entry = {
        "step": 3,
        "does": "skip",
        "rows": [8, 12],
        "why": "it is not finite",
        "worst_first": [{"text": "a\u2028b"}],
    }
    (folder / "runs" / "quickstart" / SPIKES_FILE).write_text(files.format_json_line(entry), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def unharmed(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, gone on to its end."""
    code, said, run = resumed(original, tmp_path_factory.mktemp("unharmed"))
    assert code == DONE, said
    assert verify_run(run)
    return run


def words(folder: Path, *overrides: str) -> list[str]:
    return tiny.words(folder, *SETTINGS, "sample.every=2", *overrides)


def resumed(original: Path, folder: Path, name: str = "", place: float = 0, bit: int = 0) -> tuple[int, str, Path]:
    """A copy, with one bit of the file `name` turned over, goes on: exit code, what it said, its folder."""
    shutil.copytree(original / "runs", folder / "runs")
    run = folder / "runs" / "quickstart"
    if name:
        content = bytearray((run / name).read_bytes())
        content[int(place * len(content))] ^= 1 << bit
        (run / name).write_bytes(content)
    life = zygote().train(words(folder, f"data.path={original / 'corpus'}"), 1, folder / "log")
    (code,) = life.end()
    assert isinstance(code, int)
    return code, life.text(), run


def trial(original: Path, unharmed: Path, folder: Path, name: str, dice: random.Random) -> str:
    """What became of one flip: refused, said, seen by verify, or nothing depends on it."""
    place, bit = dice.random(), dice.randrange(8)
    code, said, run = resumed(original, folder, name, place, bit)
    about = f"{name} at {place}, bit {bit}: {said}"
    assert "Traceback" not in said, about
    if code == BAD_INPUT:
        assert name in said, about
        return "refused, the file named"
    assert code == DONE, about
    same_weights(run, unharmed, about)
    seen = not verify_run(run)
    shutil.rmtree(folder)
    if str(run / name) in said or (name == CONFIG_FILE and "changed " in said):
        return "said at the start"
    return "seen by verify" if seen else "nothing depends on it"


def same_weights(run: Path, unharmed: Path, about: str) -> None:
    """Bit for bit, masters and moments too; and the losses of the steps that were done again or newly."""
    ours, theirs = (step_folder(folder / "checkpoints", LAST) for folder in (run, unharmed))
    for path in sorted(theirs.rglob("*")):
        if path.suffix in (".pt", ".safetensors"):
            assert same_bits(tensors(ours / path.relative_to(theirs)), tensors(path)), about
    later = [[line for line in numbers(folder) if line["step"] > 4] for folder in (run, unharmed)]
    assert later[0] == later[1], about


@pytest.mark.slow
@pytest.mark.parametrize("name", HARMED)
def test_one_flip_of_each_record_misleads_nobody(original: Path, unharmed: Path, tmp_path: Path, name: str) -> None:
    found = trial(original, unharmed, tmp_path / "trial", name, random.Random(1))
    if name in (SPIKES_FILE, "metrics.jsonl", "samples.jsonl", CONFIG_FILE):
        assert found in ("refused, the file named", "said at the start")
    if name == LEDGER_FILE:
        assert found == "seen by verify"


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", HARMED)
def test_many_flips_of_each_record_mislead_nobody(original: Path, unharmed: Path, tmp_path: Path, name: str) -> None:
    """The counts of docs/results/record-faults.md."""
    dice = random.Random(7)
    met = Counter(trial(original, unharmed, tmp_path / f"trial-{n}", name, dice) for n in range(FLIPS))
    print(name, dict(met))
    if name != LAST_SAVED_FILE:
        assert met["nothing depends on it"] == 0


@pytest.mark.slow
def test_texts_with_any_line_break_are_no_hindrance(original: Path, tmp_path: Path) -> None:
    """The journal of `original` has one; here the documents and the prompts have all of them too."""
    breaks = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
    tiny.text(tmp_path)
    (tmp_path / "corpus" / "breaks.txt").write_text(f"a line{breaks}and more\n" * 50, encoding="utf-8")
    own = (f'sample.prompts=["a{breaks.encode("unicode_escape").decode()}b"]', "spikes.on_spike=skip")
    for stop in ("run.stop_after=main", "run.stop_after=null"):
        life = zygote().train(words(tmp_path, *own, stop), 1, tmp_path / "log")
        assert life.end() == [DONE], life.text()
    assert verify_run(tmp_path / "runs" / "quickstart")


@pytest.mark.slow
def test_a_start_that_ranks_refuse_binds_nobody(original: Path, tmp_path: Path) -> None:
    """Its tokenizer is not that of the weights that it asks for, which the ranks find when the data are prepared."""
    source = (f"init.from={original / 'runs' / 'quickstart'}", f"data.path={original / 'corpus'}")
    wrong = zygote().train(words(tmp_path, *source, "tokenizer.vocab_size=300"), 1, tmp_path / "log")
    assert wrong.end() == [BAD_INPUT], wrong.text()
    run = tmp_path / "runs" / "quickstart"
    assert not (run / CONFIG_FILE).exists()
    assert not (run / "data" / "index.json").exists()
    right = zygote().train(words(tmp_path, *source), 1, tmp_path / "log")
    assert right.end() == [DONE], right.text()
