"""How long a plan is: resolved by the data that were prepared, and told in steps, tokens and epochs."""

from pathlib import Path

import pytest

from smoltrain.cli import main
from smoltrain.config.load import cut_micro_batch, load_config
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.errors import UserError
from smoltrain.estimate.horizon import (
    count_epoch_tokens,
    describe_plan,
    format_count,
    format_hours,
    read_index,
    resolve_config,
)
from smoltrain.run.run_folder import accumulation_steps
from smoltrain.schedule import Plan
from tests import tiny

MIX = "data.sources=[{name: a, path: a.txt, weight: 1}, {name: b, path: b.txt, weight: 1}]"
NO_STEPS = ("phases.main.steps=null", "phases.continuation.steps=null")
EPOCHS = (*NO_STEPS, "phases.main.epochs=0.5", "phases.main.warmup_steps=0", "phases.continuation.tokens=200")


def refused(folder: Path, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        resolve_config(tiny.load(folder, *words), 4)
    (problem,) = caught.value.problems
    return str(problem)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"), (7, "7"), (0.25, "0.25"), (999, "999"), (1000, "1K"), (327_680, "328K"), (999_499, "999K"),
        (999_500, "1M"), (20_480_000, "20.5M"), (999_949_999, "1B"), (1_500_000_000, "1.5B"), (10**15, "1000T"),
    ],
)  # fmt: skip
def test_a_count_has_three_digits(number: float, text: str):
    assert format_count(number) == text


def test_tokens_are_steps_of_all_rows(tmp_path: Path):
    """16 targets a row: 400 of them are 25 rows, 7 steps of 4 and 4 of 8."""
    config = tiny.load(tmp_path, *NO_STEPS, "phases.main.tokens=400", "phases.continuation.tokens=65")
    assert [phase.steps for phase in resolve_config(config, 4).phases] == [7, 2]
    assert [phase.steps for phase in resolve_config(config, 8).phases] == [4, 1]
    assert resolve_config(tiny.load(tmp_path), 4) == tiny.load(tmp_path)


def test_epochs_are_those_of_the_prepared_data(tmp_path: Path):
    config = tiny.load(tmp_path, *EPOCHS)
    assert "phases.main.epochs=0.5 are: saw nothing prepared yet, want `smoltrain prepare data`" in refused(
        tmp_path, *EPOCHS
    )
    assert describe_plan(config, 4, read_index(config.run_folder)) == "main 0.5 epochs, continuation 200 tokens"
    prepared = prepare_run_data(config, 4)
    num_rows = (len(prepared.train[0]) - 1) // 16
    assert count_epoch_tokens(prepared.index, 16) == num_rows * 16
    found = resolve_config(config, 4).phases
    assert [phase.steps for phase in found] == [-(-num_rows // 8), 4]
    steps = Plan(found).phases[0].last
    said = describe_plan(config, 4, read_index(config.run_folder))
    main = f"main 1-{steps} ({format_count(64 * steps)} tokens, {4 * steps / num_rows:.3g} epochs)"
    assert said == f"{main}, continuation {steps + 1}-{steps + 4} (256 tokens, {16 / num_rows:.3g} epochs)"
    other = tiny.load(tmp_path, *EPOCHS, "run.name=other")
    assert resolve_config(other, 4, config.run_folder).phases == found, "an ancestor's data will be its own"


@pytest.mark.parametrize(
    ("words", "saw"),
    [
        (
            (MIX, "data.path=null", "data.package=null"),
            "a mix of a, b, each with an epoch of its own, want steps or tokens",
        ),
        (("data.mode=stream",), "data.mode=stream, which has no last row, want steps or tokens, or data.mode=cached"),
    ],
)
def test_data_without_epochs_are_refused_before_anybody_prepares_them(tmp_path: Path, words: tuple[str, ...], saw: str):
    line = refused(tmp_path, *EPOCHS, *words)
    assert line.startswith("nobody can say how many steps phases.main.epochs=0.5 are: saw ")
    assert saw in line
    assert line.endswith("; change phases.main.epochs")


def test_streams_and_mixes_have_no_epochs_to_tell(tmp_path: Path):
    config = tiny.load(tmp_path, "data.mode=stream", "data.streams=1")
    index = prepare_run_data(config, 4).index
    assert count_epoch_tokens(index, 16) is None
    assert describe_plan(config, 4, index) == "main 1-8 (512 tokens), continuation 9-12 (256 tokens)"


@pytest.mark.parametrize(
    ("name", "rows", "one", "four"),
    [
        ("smollm2-135m", 32, (32, 1), (8, 1)),
        ("smollm2-124m", 32, (8, 4), (8, 1)),
        ("smollm2-135m-hf", 32, (8, 4), (8, 1)),
        ("smollm-149m-mha", 32, (32, 1), (8, 1)),
        ("shakespeare-80m", 2, (2, 1), None),
    ],
)
def test_the_recipes_rows_are_those_of_the_originals_one_device(
    name: str, rows: int, one: tuple[int, int], four: tuple[int, int] | None
):
    """(rows at once, micro-batches) of each of 1 and 4 ranks."""
    config = load_config(name)
    splits = []
    for world in (1, 4) if four else (1, 2):
        assert config.batch.rows(world) == rows
        micro_batch = cut_micro_batch(config, rows, world).batch.micro_batch_rows
        splits.append((micro_batch, accumulation_steps(config, rows, world)))
    assert splits == [one, four or (1, 1)]


def test_eight_ranks_are_estimated_for_the_rows_of_one(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        main(["estimate", "smollm2-135m", "--world", "8", "--device", "h100"])
    assert not left.value.code
    assert " 32 rows a step, 4 x 1 of them a rank, " in capsys.readouterr().out


def test_show_and_estimate_tell_steps_tokens_and_epochs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = tiny.words(tmp_path, *EPOCHS)
    prepare_run_data(tiny.load(tmp_path, *EPOCHS), 4)
    told = []
    for verb in (["show"], ["show", "--plan"], ["estimate", "--device", "l4"]):
        with pytest.raises(SystemExit) as left:
            main([verb[0], "quickstart", *words, *verb[1:]])
        assert not left.value.code
        told.append(capsys.readouterr().out)
    whole, plan, estimate = told
    config = tiny.load(tmp_path, *EPOCHS)
    line = describe_plan(config, 4, read_index(config.run_folder))
    assert f"# plan on one rank {line}\n" in whole
    assert f"plan on one rank {line} warm" in " ".join(plan.split()), "above the table"
    resolved = Plan(resolve_config(config, 4).phases)
    assert f"\n{resolved.last_step:,} steps, {format_count(64 * resolved.last_step)} tokens, 0." in estimate
    assert " epochs: " in estimate


@pytest.mark.parametrize(
    ("hours", "said"),
    [
        (2.8 / 3600, "2.8 seconds"),
        (40 / 3600, "40 seconds"),
        (0.25, "15 minutes"),
        (2.5, "2.5 hours"),
        (9000, "375 days"),
    ],
)
def test_a_duration_is_told_in_the_largest_unit_that_it_has_more_than_one_of(hours: float, said: str):
    assert format_hours(hours) == said
