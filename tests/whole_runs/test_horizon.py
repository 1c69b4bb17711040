"""A run with phases in tokens and epochs, killed and gone on with under another launcher, is the run in steps."""

from pathlib import Path

import pytest
import yaml

from smoltrain.data.tokens.load_prepared import load_prepared_data
from smoltrain.errors import DONE
from tests import launches, preloaded, tiny

QUIET = (
    "sample.every=0", "track.gradients_every=0", "evaluate.every=20", "checkpoint.every=10",
    "phases.main.warmup_steps=3",
)  # fmt: skip
MAIN, CONTINUATION = 40, 10  # steps of 2 ranks x 2 x 2 rows of 16 targets: 128 tokens
NO_STEPS = ("phases.main.steps=null", "phases.continuation.steps=null")


@pytest.mark.slow
def test_a_run_in_tokens_is_the_run_in_steps_through_a_kill(tmp_path: Path) -> None:
    whole, asked = tmp_path / "steps", tmp_path / "tokens"
    in_steps = tiny.words(whole, *QUIET, f"phases.main.steps={MAIN}", f"phases.continuation.steps={CONTINUATION}")
    assert launches.run("smoltrain", in_steps, whole / "log") == DONE, (whole / "log").read_text()
    reference = whole / "runs" / "quickstart"

    rows = (len(load_prepared_data(tiny.load(whole)).train[0]) - 1) // 16
    epochs = round(CONTINUATION * 8 / rows - 0.001, 4)  # a few tokens less than so many steps
    horizon = (*NO_STEPS, f"phases.main.tokens={MAIN * 128 - 100}", f"phases.continuation.epochs={epochs}")
    words, run = tiny.words(asked, *QUIET, *horizon), asked / "runs" / "quickstart"
    process = launches.start("smoltrain", words, asked / "log", preloaded.programs())  # SIGKILL is the same to all
    try:
        launches.wait_for_step(run, 25, process)
    finally:
        launches.kill_all(words)
        process.wait()
    assert launches.run("torchrun", words, asked / "log") == DONE, (asked / "log").read_text()

    assert launches.losses(run) == launches.losses(reference)
    assert sorted(launches.losses(run)) == list(range(1, MAIN + CONTINUATION + 1))
    for step in (MAIN, MAIN + CONTINUATION):
        assert launches.weights_digest(run, step) == launches.weights_digest(reference, step)
    ledgers = [[line.get("data/ledger") for line in launches.metrics(folder)][-1] for folder in (run, reference)]
    assert ledgers[0] == ledgers[1]

    written = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert [phase["steps"] for phase in written["phases"]] == [MAIN, CONTINUATION]
    asked_for = {"phases.main.tokens": MAIN * 128 - 100, "phases.continuation.epochs": epochs}
    assert [start["asked"] for start in written["provenance"]["starts"]] == [asked_for] * 2
    said = (asked / "log").read_text()
    assert said.count(" main 1-40 (5.12K tokens, ") == 2
    assert said.count("tokens per parameter") == 1, "the numbers of the plan are told where the run begins"
