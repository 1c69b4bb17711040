"""`smoltrain eval`: what it prints, what it writes into the run's folder, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from smoltrain import cli
from smoltrain.errors import UserError
from smoltrain.evaluation.evaluate_model import format_metrics, parse_task_names
from smoltrain.evaluation.results import Evaluation, TaskDetails, read_evaluations

DETAILS = TaskDetails(
    num_fewshot=2, limit=10, documents=10, task_version="1.0", versions={}, device="cpu", dtype="float32", time="",
    seconds=1.0,
)  # fmt: skip


def call(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        cli.main([str(word) for word in words])
    told = capsys.readouterr()
    assert isinstance(left.value.code, int)
    return left.value.code, told.out, told.err


def test_a_metric_stands_with_its_error_and_what_it_was_measured_on() -> None:
    tasks = {"arc": {"acc": 0.25, "acc_stderr": 0.125, "bits": 1.5}}
    assert format_metrics(Evaluation(step=3, tasks=tasks, details={"arc": DETAILS})) == [
        "arc  acc 0.2500 ± 0.1250  (10 documents, the first of them: --limit 10, 2-shot)",
        "arc  bits 1.5000  (10 documents, the first of them: --limit 10, 2-shot)",
    ]


def test_a_task_that_has_fewer_documents_than_the_limit_was_measured_whole() -> None:
    details = DETAILS.copy()
    details["limit"] = 1000
    [line] = format_metrics(Evaluation(step=3, tasks={"arc": {"acc": 0.25}}, details={"arc": details}))
    assert line == "arc  acc 0.2500  (10 documents, 2-shot)"


def test_names_are_read_once_each_and_none_is_refused() -> None:
    assert parse_task_names("arc_easy, piqa,,arc_easy") == ["arc_easy", "piqa"]
    with pytest.raises(UserError, match="there is no task"):
        parse_task_names(" ,")


def test_without_the_harness_there_is_one_line_that_names_the_extra(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "smoltrain.evaluation.harness", raising=False)
    monkeypatch.delattr("smoltrain.evaluation.harness", raising=False)
    code, out, err = call(capsys, "eval", run, "--tasks", "smoltrain_sentences")
    assert (code, out) == (2, "")
    assert "lm-evaluation-harness is not installed" in err
    assert '".[eval]"' in err
    assert "Traceback" not in err


@pytest.mark.slow  # lm_eval takes four seconds to import
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_numbers_are_printed_and_kept(run: Path, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    words = ("--tasks", "smoltrain_sentences", "--limit", 16)
    code, out, err = call(capsys, "eval", run, *words, "--checkpoint", 8)
    assert code == 0, err
    [evaluation] = read_evaluations(run)
    file = run / "evaluations" / "step-8.json"
    assert json.loads(file.read_text()) == evaluation
    metrics = evaluation["tasks"]["smoltrain_sentences"]
    details = evaluation["details"]["smoltrain_sentences"]
    assert (details["documents"], details["limit"], details["num_fewshot"], details["device"]) == (16, 16, 0, "cpu")
    assert details["versions"].keys() == {"smoltrain", "lm_eval", "torch", "datasets"}
    assert out.splitlines() == [
        f"smoltrain_sentences  acc {metrics['acc']:.4f} ± {metrics['acc_stderr']:.4f}  "
        "(16 documents, the first of them: --limit 16, 0-shot)",
        f"written to {file}",
    ]
    assert "computes on cpu in fp32" in err
    code, out, err = call(capsys, "eval", exported, *words, "--json")
    assert code == 0, err
    assert json.loads(out)["tasks"].keys() == {"smoltrain_sentences"}
    assert sorted(path.name for path in exported.iterdir() if "eval" in path.name) == []
    file.write_text("damaged")
    code, out, err = call(capsys, "eval", run, "--tasks", "smoltrain_sentences", "--limit", 1, "--checkpoint", 8)
    assert (code, file.read_text()) == (0, "damaged"), err
    assert out.startswith("smoltrain_sentences  acc ")
    assert "WARNING: these numbers are not kept in the run's folder: an evaluation cannot be read: " in out
    file.unlink()


def test_perplexity_is_printed_for_each_file_and_for_all(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text(f"the king of {name} met the queen")
    words = ("perplexity", run, tmp_path / "one.txt", tmp_path / "two.txt", "--max-length", 32, "--stride", 8)
    code, out, err = call(capsys, *words)
    assert code == 0, err
    assert [line.partition(": perplexity ")[0] for line in out.splitlines()] == [
        str(tmp_path / "one.txt"), str(tmp_path / "two.txt"), "all",
    ]  # fmt: skip
    assert err == (
        "computes on cpu in fp32, in windows of 32 tokens (as --context asks), each 8 behind the one before\n"
    )
    found = json.loads(call(capsys, *words, "--json")[1])
    assert (found["context"], found["stride"], found["step"], found["documents"]) == (32, 8, 12, 2)
    assert [file["name"] for file in found["files"]] == [str(tmp_path / "one.txt"), str(tmp_path / "two.txt")]
    assert f"all: perplexity {found['perplexity']:,.4f}, " in out
    code, out, err = call(capsys, "perplexity", run, tmp_path / "gone.txt")
    assert (code, out) == (2, "")
    assert "there is no such file" in err
