"""A run's folder knows its run: what may change between two starts, what may not, and who started it."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from smoltrain.checkpoint.identity import find_config_differences
from smoltrain.config.load import load_config, read_run_config
from smoltrain.config.schema import Config, PhaseSection
from smoltrain.errors import Problem, UserError
from smoltrain.run.run_folder import (
    accumulation_steps,
    choose_training_ranks,
    describe_idle_ranks,
    find_git_commit,
    find_rows_per_step,
    make_run_record,
)
from tests import tiny
from tests.tiny import enter_run_folder

DONE = 6  # of main's 8 steps; the warm-up is 2, the schedule cosine


def file_of(settings: Config) -> Path:
    return settings.run_folder / "config.yaml"


def provenance(settings: Config) -> dict[str, Any]:
    return yaml.safe_load(file_of(settings).read_text(encoding="utf-8"))["provenance"]


def edited(settings: Config, **sections: dict[str, Any]) -> Config:
    """The config with some values of some sections replaced."""
    tree = settings.model_dump()
    for section, values in sections.items():
        tree[section] |= values
    return Config.model_validate(tree)


def with_phases(settings: Config, *phases: dict[str, Any]) -> Config:
    return settings.model_copy(update={"phases": tuple(PhaseSection.model_validate(phase) for phase in phases)})


def phases_of(settings: Config) -> list[dict[str, Any]]:
    return [phase.model_dump() for phase in settings.phases]


def refused(settings: Config, done: int = DONE, world_size: int = 1) -> list[Problem]:
    """The problems of entering again, after which the folder must be as it was."""
    before = file_of(settings).read_bytes()
    with pytest.raises(UserError) as caught:
        enter_run_folder(settings, world_size, done)
    assert file_of(settings).read_bytes() == before
    assert [path.name for path in settings.run_folder.iterdir()] == ["config.yaml"]
    return list(caught.value.problems)


@pytest.fixture
def settings(tmp_path: Path) -> Config:
    """A config whose run has started on one rank: 2 rows x 2 accumulated = 4 rows per step."""
    started = tiny.load(tmp_path)
    enter_run_folder(started, 1, 0)
    return started


# ---- the first start, and the next


def test_the_first_start_writes_the_whole_config_and_where_it_came_from(tmp_path: Path) -> None:
    settings = tiny.load(tmp_path, "sample.prompts=['null', '  x\n', 'off', '1e-3', 'Ä→']", "run.seed=7")
    folder = enter_run_folder(settings, 3, 0)
    assert read_run_config(file_of(settings)) == settings
    assert folder.rows_per_step == 2 * 2 * 3
    assert re.fullmatch("[0-9a-f]{8}", folder.wandb_id)
    facts = provenance(settings)
    assert facts["rows_per_step"] == folder.rows_per_step
    assert facts["wandb_id"] == folder.wandb_id
    (start,) = facts["starts"]
    assert set(start["versions"]) == {"torch", "deepspeed", "tokenizers", "wandb", "numpy"}
    assert (start["from_step"], start["ranks"]) == (0, 3)
    assert re.fullmatch(r"[0-9a-f]{40}\+?|unknown", start["git_commit"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", start["time"])
    assert "changes" not in start


def test_two_runs_have_two_wandb_ids(tmp_path: Path) -> None:
    ids = {enter_run_folder(tiny.load(tmp_path, f"run.name=run{i}"), 1, 0).wandb_id for i in range(3)}
    assert len(ids) == 3


def test_rows_per_step_may_be_said_outright(tmp_path: Path) -> None:
    settings = tiny.load(tmp_path, "batch.accumulation=null", "batch.rows_per_step=24")
    assert enter_run_folder(settings, 3, 0).rows_per_step == 24
    assert accumulation_steps(settings, 24, 3) == 4


@pytest.mark.parametrize(
    ("rows", "micro_batch", "world", "accumulation"),
    [(32, 32, 1, 1), (32, 32, 8, 1), (32, 8, 1, 4), (32, 8, 4, 1), (32, 8, 16, 1), (12, 4, 6, 1)],
)
def test_rows_outright_are_split_on_any_world_that_divides_them(
    tmp_path: Path, rows: int, micro_batch: int, world: int, accumulation: int
) -> None:
    words = (f"batch.rows_per_step={rows}", "batch.accumulation=null", f"batch.micro_batch={micro_batch}")
    assert accumulation_steps(tiny.load(tmp_path, *words), rows, world) == accumulation


@pytest.mark.parametrize(
    ("micro_batch", "world", "want"),
    [(2, 8, "one of 1, 2 ranks"), (2, 3, "one of 1, 2 ranks"), (1, 4, "one of 1, 2 ranks")],
)
def test_worlds_that_divide_the_rows_are_named(tmp_path: Path, micro_batch: int, world: int, want: str) -> None:
    words = ("batch.rows_per_step=2", "batch.accumulation=null", f"batch.micro_batch={micro_batch}")
    with pytest.raises(UserError, match=f"2 rows per step do not divide evenly: .*, want {want}; change"):
        accumulation_steps(tiny.load(tmp_path, *words), 2, world)


@pytest.mark.parametrize(
    ("rows", "micro_batch", "ranks", "streams", "training"),
    [
        (8, 2, 3, None, 2),
        (8, 2, 8, None, 8),  # a rank takes the one row that is left to it
        (8, 2, 7, None, 4),
        (12, 1, 5, None, 4),
        (100, 1, 10, 20, 10),
        (100, 1, 26, 20, 20),  # 25 ranks divide the rows, but not the streams
        (17, 1, 8, None, 1),
        (9, 2, 4, None, 4),  # no number fits: what does is said later
    ],
)
def test_as_many_ranks_train_as_the_rows_divide_among(
    tmp_path: Path, rows: int, micro_batch: int, ranks: int, streams: int | None, training: int
) -> None:
    words = (f"batch.rows_per_step={rows}", "batch.accumulation=null", f"batch.micro_batch={micro_batch}")
    assert choose_training_ranks(tiny.load(tmp_path, *words), rows, ranks, streams) == training


@pytest.mark.parametrize(
    ("rows", "training", "ranks", "streams", "said"),
    [
        (8, 2, 3, None, "8 rows per step do not divide evenly among 3 ranks: 2 train, 1 is idle"),
        (100, 20, 26, 20, "100 rows per step do not divide evenly among 26 ranks: 20 train, 6 are idle"),
        (12, 4, 6, 4, "4 streams do not divide evenly among 6 ranks: 4 train, 2 are idle"),
        (
            4, 1, 2, None,
            "the 2 rows of each of 2 ranks are no whole number of micro-batches: 1 trains, 1 is idle; with a "
            "batch.micro_batch that divides 2 all train",
        ),
    ],
)  # fmt: skip
def test_why_ranks_are_idle(rows: int, training: int, ranks: int, streams: int | None, said: str) -> None:
    assert describe_idle_ranks(rows, training, ranks, streams) == f"WARNING: {said}"


def test_what_was_asked_for_is_recorded_beside_the_steps(settings: Config) -> None:
    record = make_run_record(settings, 1, DONE, asked={"phases.main.tokens": 400_000_000})
    starts = record.provenance["starts"]
    assert (starts[1]["asked"], "asked" in starts[0]) == ({"phases.main.tokens": 400_000_000}, False)


def test_rows_per_step_are_those_that_the_run_began_with(settings: Config, tmp_path: Path) -> None:
    assert find_rows_per_step(settings, 5) == 4
    assert find_rows_per_step(tiny.load(tmp_path, "run.name=fresh"), 5) == 20
    assert find_rows_per_step(edited(settings, run={"name": "child"}), 5, settings.run_folder) == 4


def test_entering_again_keeps_the_identity_and_adds_to_the_history(settings: Config) -> None:
    before = provenance(settings)
    changed = edited(settings, track={"print_every": 5, "wandb": "offline"}, checkpoint={"keep_last": 3})
    folder = enter_run_folder(changed, 2, DONE)
    after = provenance(changed)
    assert (folder.wandb_id, folder.rows_per_step) == (before["wandb_id"], before["rows_per_step"])
    assert after["starts"][0] == before["starts"][0]
    assert (after["starts"][1]["from_step"], after["starts"][1]["ranks"]) == (DONE, 2)
    assert set(after["starts"][1]["changes"]) == {
        "track.print_every: 2 -> 5",
        "track.wandb: 'off' -> 'offline'",
        "checkpoint.keep_last: 2 -> 3",
    }
    assert read_run_config(file_of(changed)) == changed
    enter_run_folder(changed, 1, DONE)
    assert provenance(changed)["starts"][2]["changes"] == []
    assert len(provenance(changed)["starts"]) == 3


def test_checking_writes_nothing(settings: Config, tmp_path: Path) -> None:
    before = file_of(settings).read_bytes()
    assert len(make_run_record(settings, 1, DONE).provenance["starts"]) == 2
    assert file_of(settings).read_bytes() == before
    fresh = tiny.load(tmp_path, "run.name=fresh")
    assert make_run_record(fresh, 1, 0).provenance["rows_per_step"] == 4
    assert not fresh.run_folder.exists()


def test_a_first_start_that_does_not_fit_leaves_no_folder(tmp_path: Path) -> None:
    settings = tiny.load(tmp_path, "batch.accumulation=null", "batch.rows_per_step=12")
    with pytest.raises(UserError, match="12 rows per step do not divide evenly"):
        enter_run_folder(settings, 4, 0)
    assert not settings.run_folder.exists()


# ---- what may not change

FORBIDDEN = [
    ({"model": {"hidden_size": 64}}, "model.hidden_size", "64", "32"),
    ({"model": {"dropout": 0.1}}, "model.dropout", "0.1", "0.0"),
    ({"tokenizer": {"vocab_size": 300}}, "tokenizer.vocab_size", "300", "320"),
    ({"data": {"pattern": "*.md"}}, "data.pattern", "*.md", "**/*"),
    ({"data": {"validation_share": 0.1}}, "data.validation_share", "0.1", "0.2"),
    ({"data": {"shuffle_rows": 9}}, "data.shuffle_rows", "9", "256"),
    ({"packing": {"document_mask": True}}, "packing.document_mask", "true", "false"),
    ({"run": {"seed": 7}}, "run.seed", "7", "1234"),
    ({"batch": {"sequence_length": 32}}, "batch.sequence_length", "32", "16"),
    ({"optimizer": {"beta2": 0.99}}, "optimizer.beta2", "0.99", "0.95"),
    ({"optimizer": {"kind": "muon"}}, "optimizer.kind", "muon", "adamw"),
    ({"optimizer": {"momentum": 0.9}}, "optimizer.momentum", "0.9", "0.95"),
    ({"optimizer": {"gradient_clipping": 0.0}}, "optimizer.gradient_clipping", "0.0", "1.0"),
    ({"batch": {"accumulation": 4}}, "batch.accumulation", "4", "2"),
    ({"batch": {"rows_per_step": 8}}, "batch.rows_per_step", "8", "null"),
]


@pytest.mark.parametrize(("sections", "key", "now", "was"), FORBIDDEN, ids=[row[1] for row in FORBIDDEN])
def test_each_fixed_value_is_refused(settings: Config, sections: dict[str, Any], key: str, now: str, was: str) -> None:
    (problem,) = refused(edited(settings, **sections))
    assert problem.what == "the config differs from the run's own"
    assert problem.saw == f"{key}: {was} in the run, {now} asked"
    assert problem.want == "the run's values: 6 steps were trained with them"
    assert str(settings.run_folder) in problem.change
    assert "run.name" in problem.change


def test_all_differences_are_one_sentence(settings: Config) -> None:
    sections: dict[str, Any] = {}
    for changes, _, _, _ in FORBIDDEN:
        for section, values in changes.items():
            sections[section] = sections.get(section, {}) | values
    phases = phases_of(settings)
    phases[0]["lr"] = 1e-3
    (problem,) = refused(with_phases(edited(settings, **sections), *phases))
    assert set(problem.saw.split("; ")) == {
        *(f"{key}: {was} in the run, {now} asked" for _, key, now, was in FORBIDDEN),
        "phases.main.lr: 3e-3 in the run, 1e-3 asked (from step 1 on)",
    }
    assert problem.saw in str(problem), "which is not cut"


@pytest.mark.parametrize(
    ("sections", "fits"),
    [
        ({"optimizer": {"beta2": 0.99}}, True),
        ({"optimizer": {"kind": "muon"}}, True),
        ({"model": {"dropout": 0.1}}, True),
        ({"model": {"hidden_size": 64}}, False),
        ({"tokenizer": {"vocab_size": 300}}, False),
        ({"data": {"pattern": "*.md"}}, False),  # on which another BPE would be trained
    ],
)
def test_another_run_may_begin_with_the_weights_where_they_fit(
    settings: Config, sections: dict[str, Any], fits: bool
) -> None:
    (problem,) = refused(edited(settings, **sections))
    assert (f"(init.from={settings.run_folder} begins with the weights of this one)" in problem.change) == fits
    (problem,) = refused(edited(settings, **sections), done=0)
    assert problem.want == "the run's values", "before the first step too"
    assert "init.from" not in problem.change, "there are no weights yet"


@pytest.mark.parametrize(("key", "value"), [("lr", 1e-3), ("name", "a")])
def test_all_of_another_run_cannot_be_taken_under_another_past(settings: Config, key: str, value: object) -> None:
    first, *rest = phases_of(settings)
    child = edited(with_phases(settings, first | {key: value}, *rest), run={"name": "child"})
    with pytest.raises(UserError, match=r"or choose init\.load=weights, which takes its weights alone") as caught:
        enter_run_folder(child, 1, DONE, ancestor=settings.run_folder)
    assert "run.name" not in str(caught.value), "the child has another name"


def test_all_of_another_run_is_not_taken_by_another_optimizer(settings: Config) -> None:
    """Its state is of no use there, its weights are."""
    child = edited(settings, run={"name": "child"}, optimizer={"kind": "muon"})
    with pytest.raises(UserError) as caught:
        enter_run_folder(child, 1, DONE, ancestor=settings.run_folder)
    assert str(caught.value) == (
        "the config differs from the run's own: saw optimizer.kind: adamw in the run, muon asked, want the run's "
        "values: 6 steps were trained with them; change them back, or choose init.load=weights, which takes its "
        "weights alone"
    )
    assert not child.run_folder.exists()


@pytest.mark.parametrize(
    ("change", "saw"),
    [
        ({"lr": 1e-3}, "phases.main.lr: 3e-3 in the run, 1e-3 asked"),
        ({"weight_decay": 0.2}, "phases.main.weight_decay: 0.1 in the run, 0.2 asked"),
        ({"name": "first"}, "phases: [main, continuation] in the run, [first, continuation] asked"),
        ({"optimizer_state": "reset"}, "phases.main.optimizer_state: keep in the run, reset asked"),
        (
            {"schedule": "linear", "warmup_steps": 0},
            "phases.main.schedule: cosine in the run, linear asked (from step 1 on); "
            "phases.main.warmup_steps: 2 in the run, 0 asked",
        ),
    ],
)
def test_the_past_of_the_plan_is_refused(settings: Config, change: dict[str, Any], saw: str) -> None:
    first, *rest = phases_of(settings)
    asked = with_phases(settings, first | change, *rest)
    (problem,) = refused(asked)
    assert problem.saw == f"{saw} (from step 1 on)"
    enter_run_folder(asked, 1, 0)  # nothing is past before the first step


def test_of_the_plan_those_keys_are_named_that_touch_the_past(settings: Config) -> None:
    first, second = phases_of(settings)
    asked = with_phases(settings, first | {"lr": 1e-3, "final_lr": 0.0}, second | {"lr": 1e-5})
    (problem,) = refused(asked, done=2)
    assert problem.saw == "phases.main.lr: 3e-3 in the run, 1e-3 asked (from step 1 on)", "the rest is yet to come"
    (problem,) = refused(asked, done=10)
    assert [part.partition(":")[0] for part in problem.saw.split("; ")] == [
        "phases.main.lr",
        "phases.main.final_lr",
        "phases.continuation.lr",
    ]


def test_keys_that_belong_together_are_named_together(settings: Config) -> None:
    first, second = phases_of(settings)
    asked = with_phases(settings, first, second | {"schedule": "continue", "lr": None, "weight_decay": 0.5})
    (problem,) = refused(asked, done=10)
    assert problem.saw == (
        "phases.continuation.lr: 3e-4 in the run, null asked (from step 9 on); "
        "phases.continuation.weight_decay: 0.02 in the run, 0.5 asked (from step 9 on); "
        "phases.continuation.schedule: linear in the run, continue asked (from step 9 on)"
    )


def test_a_longer_cosine_would_have_been_another_past(settings: Config) -> None:
    first, *rest = phases_of(settings)
    (problem,) = refused(with_phases(settings, first | {"steps": 100}, *rest))
    saw = "phases.main.steps: 8 in the run, 100 asked (from step 4 on)"
    assert problem.saw == saw, "the warm-up and the peak are the same"
    enter_run_folder(with_phases(settings, first | {"steps": 100}, *rest), 1, 3)


def test_a_phase_boundary_may_not_move_into_the_past(settings: Config) -> None:
    first, *rest = phases_of(settings)
    (problem,) = refused(with_phases(settings, first | {"steps": 5}, *rest))
    assert problem.saw.startswith("phases.main.steps: 8 in the run, 5 asked (from step ")


def test_the_plan_may_not_end_in_the_past(settings: Config) -> None:
    first, _ = phases_of(settings)
    (problem,) = refused(with_phases(settings, first), done=9)
    assert problem.saw == "phases: [main, continuation] in the run, [main] asked (from step 9 on)"
    assert problem.want == "the run's values: 9 steps were trained with them"


# ---- what may


@pytest.mark.parametrize(
    "sections",
    [
        {"batch": {"micro_batch": 1}},
        {"batch": {"micro_batch": 4}},
        {"evaluate": {"every": 1, "rows": 4}, "sample": {"every": 0}, "checkpoint": {"every": 1}},
        {"track": {"wandb": "online", "wandb_project": "other", "print_every": 1, "gradients_every": 0}},
        {"engine": {"ds_config": "zero1", "precision": "fp32", "gradient_checkpointing": "none"}},
        {"generation": {"temperature": 1.5}, "run": {"stop_after": "main"}},
    ],
    ids=["smaller micro-batch", "larger micro-batch", "cadences", "tracking", "engine", "the rest"],
)
def test_what_does_not_touch_the_past_may_change(settings: Config, sections: dict[str, Any]) -> None:
    changed = edited(settings, **sections)
    assert enter_run_folder(changed, 1, DONE).rows_per_step == 4
    assert read_run_config(file_of(changed)) == changed


def test_a_micro_batch_that_does_not_divide_is_refused(settings: Config) -> None:
    (problem,) = refused(edited(settings, batch={"micro_batch": 3}))
    assert problem.saw == "1 ranks x micro_batch 3"
    assert problem.want == "a micro-batch that divides 4" or "ranks" in problem.want


def test_the_future_is_free(settings: Config) -> None:
    first, second = phases_of(settings)
    extra = {"name": "extra", "steps": 50, "schedule": "continue"}
    for plan in (
        [first, second, extra],
        [first, second | {"lr": 1e-5, "weight_decay": 0.0, "schedule": "constant", "steps": 40}],
        [first, second | {"name": "other", "optimizer_state": "reset"}],
        [first],
    ):
        enter_run_folder(with_phases(settings, *plan), 1, DONE)
    assert provenance(settings)["starts"][1]["changes"] == ["phases.extra: None -> '50 steps, continue'"]


@pytest.mark.parametrize(
    "change", [{"path": "elsewhere"}, {"patience_s": 9.0}, {"max_bad_records": 1}, {"allow_changed": True}]
)
def test_where_the_data_lie_and_how_they_are_read_may_change(settings: Config, change: dict[str, Any]) -> None:
    enter_run_folder(edited(settings, data=change), 1, DONE)


def test_other_documents_are_accepted_where_changed_data_are(settings: Config) -> None:
    enter_run_folder(edited(settings, data={"pattern": "*.md", "allow_changed": True}), 1, DONE)
    (problem,) = refused(edited(settings, data={"validation_share": 0.1, "allow_changed": True}))
    assert problem.saw == "data.validation_share: 0.2 in the run, 0.1 asked"


def test_the_mix_of_a_past_phase_is_refused(settings: Config) -> None:
    first, *rest = phases_of(settings)
    (problem,) = refused(with_phases(settings, first | {"mix": {"a": 1.0}}, *rest))
    assert problem.saw == "phases.main.mix: null in the run, {'a': 1.0} asked (from step 1 on)"


def test_a_constant_phase_may_grow(tmp_path: Path) -> None:
    constant = ("phases.main.schedule=constant", "phases.main.final_lr=0")
    enter_run_folder(tiny.load(tmp_path, *constant), 1, 0)
    grown = tiny.load(tmp_path, *constant, "phases.main.steps=80")
    enter_run_folder(grown, 1, 8)
    shrunk = tiny.load(tmp_path, *constant, "phases.main.steps=19")
    with pytest.raises(UserError, match=r"phases\.main\.steps: 80 in the run, 19 asked \(from step 20 on\)"):
        enter_run_folder(shrunk, 1, 20)


def test_the_end_of_a_phase_may_be_the_last_step_done(settings: Config) -> None:
    first, _ = phases_of(settings)
    enter_run_folder(with_phases(settings, first), 1, 8)


# ---- ranks and micro-batches


def sized(micro: int) -> Config:
    tree = load_config("quickstart").model_dump()
    tree["batch"]["micro_batch"] = micro
    return Config.model_validate(tree)


@given(micro=st.integers(1, 12), world=st.integers(1, 12), rows=st.integers(1, 400))
def test_every_world_trains_on_the_same_rows_or_learns_which_worlds_would(micro: int, world: int, rows: int) -> None:
    settings = sized(micro)
    fits = [n for n in range(1, rows + 1) if rows % (micro * n) == 0]
    if world in fits:
        assert accumulation_steps(settings, rows, world) * micro * world == rows
        return
    with pytest.raises(UserError) as caught:
        accumulation_steps(settings, rows, world)
    (problem,) = caught.value.problems
    assert problem.what == f"{rows} rows per step do not divide evenly"
    assert problem.saw == f"{world} ranks x micro_batch {micro}"
    want = f"one of {', '.join(map(str, fits))} ranks" if fits else f"a micro-batch that divides {rows}"
    assert problem.want == want


def test_differences_name_the_dotted_key_and_both_values(settings: Config) -> None:
    other = edited(settings, model={"norm": "layernorm"}, run={"stop_after": "main"})
    assert find_config_differences(settings, settings) == []
    assert find_config_differences(settings, other) == [
        ("run.stop_after", None, "main"),
        ("model.norm", "rmsnorm", "layernorm"),
    ]


def test_the_commit_is_that_of_the_sources_own_checkout(tmp_path: Path) -> None:
    """Sources that were installed into an environment inside another project's repository have none."""

    def git(*words: str) -> str:
        author = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", *author, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    sources = tmp_path / "site-packages" / "smoltrain"
    sources.mkdir(parents=True)
    (sources / "cli.py").write_text("one")
    (tmp_path / "theirs.txt").write_text("theirs")
    assert find_git_commit(sources) == "unknown", "no repository"
    git("init", "-q")
    git("add", "theirs.txt")
    git("commit", "-qm", "theirs")
    assert find_git_commit(sources) == "unknown", "theirs"
    git("add", ".")
    git("commit", "-qm", "ours")
    assert find_git_commit(sources) == git("rev-parse", "HEAD")
    index = tmp_path / ".git" / "index"
    before = index.read_bytes()
    os.utime(sources / "cli.py", (1, 1))  # which `git status` would write down
    assert find_git_commit(sources) == git("rev-parse", "HEAD")
    assert index.read_bytes() == before, "a start that is killed must leave no lock in the user's repository"
    (sources / "cli.py").write_text("two")
    assert find_git_commit(sources) == git("rev-parse", "HEAD") + "+"
