"""Tasks during training: the numbers of one process, on any number of ranks and under every ZeRO stage."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from smoltrain.config.schema import Config
from smoltrain.errors import BAD_INPUT, DONE, TrainingStopped, UserError
from tests import launches, tiny
from tests.engine.test_engine import fresh_model, loader_of
from tests.ranks import world
from tests.sessions import bare_session
from tests.training.test_step import engine_for, prepared

TEXTS = [f"{first} met {second} on the road" for first in ("the king", "my lord", "what news") for second in "abcdefg"]


def fake_harness(patch: pytest.MonkeyPatch, measure: Callable[[Any], Any]) -> None:
    """In the place of the module that needs lm_eval: `measure` gets the judge."""
    import sys

    def measure_tasks(tasks: Any, judge: Any, limit: int | None) -> Any:
        assert limit == 3
        return SimpleNamespace(metrics=measure(judge))

    module = SimpleNamespace(measure_tasks=measure_tasks)
    patch.setitem(sys.modules, "smoltrain.evaluation.harness", module)
    patch.setattr("smoltrain.evaluation.harness", module, raising=False)


def ask_everything(judge: Any) -> dict[str, dict[str, float]]:
    """Scores of windows of several lengths, in batches of few, and a text."""
    from smoltrain.config.schema import GenerationSection
    from smoltrain.evaluation.judge import WriteRequest
    from smoltrain.evaluation.score import Window

    ids = [judge.tokenizer.encode(text) for text in TEXTS]
    scores = judge.score([Window(text, len(text) - 1 - number % 3) for number, text in enumerate(ids)])
    settings = GenerationSection(max_tokens=6, temperature=0.0)
    [written, _] = judge.write([WriteRequest(ids[0], settings, ()), WriteRequest(ids[1], settings, ())])
    likely = {str(number): score.log_probability for number, score in enumerate(scores)}
    return {"likely": likely, "written": {written: 1.0}}


def evaluate(settings: Config, stop_at: int = -1) -> tuple[Any, Any, list[str]]:
    """(What every rank gets, the same by hand in one process, what was said). Each batch has few windows."""
    from smoltrain.evaluation import score
    from smoltrain.evaluation.judge import LoadedJudge
    from smoltrain.training.evaluate_tasks import evaluate_run_tasks

    wrapped, here = engine_for(settings, "fp32"), world()
    loader = loader_of(settings, here.rank, here.size)
    state = torch.get_rng_state()
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return here.rank == 1 and len(asked) == stop_at

    session = bare_session(settings, wrapped, loader, stop=stop)
    tasks: Any = "tasks" if here.is_first else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score, "MAX_BATCH_TOKENS", 40)
        fake_harness(patch, ask_everything)
        together = evaluate_run_tasks(session, tasks)
    assert torch.equal(state, torch.get_rng_state()), "training must draw the same numbers as without it"
    assert wrapped.module.training
    model = fresh_model(settings).eval()
    tokenizer = loader.prepared.tokenizer
    loaded: Any = SimpleNamespace(
        model=model, tokenizer=tokenizer, stop_ids=[tokenizer.separator_id],
        banned_ids=tokenizer.unused_ids(settings.model.vocab_size), seed=settings.run.seed,
    )  # fmt: skip
    return together, ask_everything(LoadedJudge(loaded)), session.tracker.said


@pytest.mark.parametrize("stage", [2, 3])
def test_all_ranks_get_what_one_process_computes(tmp_path: Path, ranks: Any, stage: int) -> None:
    words = (f"engine.ds_config=zero{stage}", "engine.precision=fp32", "model.dropout=0.2")
    settings = prepared(tmp_path, *words, "evaluate.tasks=[t]", "evaluate.tasks_every=4", "evaluate.tasks_limit=3")
    for together, alone, said in ranks(2).run(evaluate, settings):
        assert together["likely"] == pytest.approx(alone["likely"], rel=1e-5)
        assert together["written"] == alone["written"]
        assert said == []


def test_a_signal_ends_it_on_all_ranks(tmp_path: Path, ranks: Any) -> None:
    words = ("engine.ds_config=zero3", "engine.precision=fp32")
    settings = prepared(tmp_path, *words, "evaluate.tasks=[t]", "evaluate.tasks_every=4", "evaluate.tasks_limit=3")
    for stop_at in (2, 7):
        assert [together for together, _, _ in ranks(2).run(evaluate, settings, stop_at)] == [None, None]


def fail(settings: Config, error: Exception) -> tuple[Any, list[str]]:
    from smoltrain.training.evaluate_tasks import evaluate_run_tasks

    def measure(judge: Any) -> None:
        raise error

    wrapped, here = engine_for(settings, "fp32"), world()
    session = bare_session(settings, wrapped, loader_of(settings, here.rank, here.size))
    with pytest.MonkeyPatch.context() as patch:
        fake_harness(patch, measure)
        tasks: Any = "tasks" if here.is_first else None
        return evaluate_run_tasks(session, tasks), session.tracker.said


def lose_numbers(settings: Config) -> None:
    from smoltrain.training.evaluate_tasks import evaluate_run_tasks

    wrapped, here = engine_for(settings, "fp32"), world()
    with torch.no_grad():
        wrapped.module.norm.weight.fill_(torch.nan)
    session = bare_session(settings, wrapped, loader_of(settings, here.rank, here.size))
    with pytest.MonkeyPatch.context() as patch:
        fake_harness(patch, ask_everything)
        tasks: Any = "tasks" if here.is_first else None
        evaluate_run_tasks(session, tasks)


def test_a_task_that_fails_ends_no_run_and_a_model_without_numbers_does(tmp_path: Path, ranks: Any) -> None:
    words = ("evaluate.tasks=[t]", "evaluate.tasks_every=4", "evaluate.tasks_limit=3", "engine.precision=fp32")
    settings = prepared(tmp_path, *words)
    [(first, said), (second, _)] = ranks(2).run(fail, settings, KeyError("choices"))
    assert (first, second, said) == (None, None, ["WARNING: the tasks were not measured (KeyError: 'choices')"])
    with pytest.raises(TrainingStopped, match="its logits are not finite numbers"):
        ranks(2).run(lose_numbers, settings)


@pytest.mark.slow
def test_a_run_logs_its_tasks_and_refuses_a_wrong_one_before_it_begins(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    cadence = ("evaluate.tasks_every=6", "evaluate.tasks_limit=12", "phases.continuation.steps=1")
    words = tiny.words(tmp_path, "evaluate.tasks=[smoltrain_sentences]", *cadence)
    log = tmp_path / "log"
    assert launches.run("smoltrain", words, log) == DONE, log.read_text()
    run = tmp_path / "runs" / "quickstart"
    lines = [line for line in launches.metrics(run) if "speed/task_evaluation_s" in line]
    assert [line["step"] for line in lines] == [6, 8, 9], "at its cadence, and at the end of each phase"
    accuracy = "evaluation/smoltrain_sentences/acc"
    assert all({accuracy, f"{accuracy}_stderr"} <= line.keys() for line in lines)
    assert all(line[accuracy] * 12 == pytest.approx(round(line[accuracy] * 12)) for line in lines)
    assert all(line["speed/task_evaluation_s"] > 0 for line in lines)
    assert f"smoltrain_sentences at step 9: acc {lines[-1][accuracy]:.4f} ± " in log.read_text()
    wrong = tiny.words(tmp_path, "evaluate.tasks=[smoltrain_sentence]", "run.name=wrong", *cadence[:1])
    assert launches.run("smoltrain", wrong, log) == BAD_INPUT
    assert "no such task: saw 'smoltrain_sentence', want 'smoltrain_sentences'" in log.read_text()
    assert not (tmp_path / "runs" / "wrong" / "data").exists(), "no document was tokenised"


def load_on_two(settings: Config, error: Exception | None) -> tuple[Any, list[str]]:
    import sys

    from smoltrain.training.run_tasks import load_run_tasks

    def load_tasks(names: Any, *, say: Callable[[str], None]) -> Any:
        say(f"reads {', '.join(names)}")
        if error:
            raise error
        return "tasks"

    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        module = SimpleNamespace(load_tasks=load_tasks)
        patch.setitem(sys.modules, "smoltrain.evaluation.harness", module)
        patch.setattr("smoltrain.evaluation.harness", module, raising=False)
        return load_run_tasks(settings, world(), said.append), said


def test_tasks_are_loaded_once_and_a_refusal_is_everyones(tmp_path: Path, ranks: Any) -> None:
    from smoltrain.errors import Problem

    settings = prepared(tmp_path, "evaluate.tasks=[t]", "evaluate.tasks_every=4")
    assert ranks(2).run(load_on_two, settings, None) == [("tasks", ["reads t"]), (None, [])]
    with pytest.raises(UserError, match="no such task"):
        ranks(2).run(load_on_two, settings, UserError(Problem("no such task", "t", "another", "evaluate.tasks")))
    assert ranks(2).run(load_on_two, prepared(tmp_path), None) == [(None, []), (None, [])]
