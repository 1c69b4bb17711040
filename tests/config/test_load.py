"""Recipes, overrides, and the messages for what does not fit."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from smoltrain.config.load import (
    config_to_yaml,
    cut_micro_batch,
    list_recipes,
    load_config,
    override_generation,
    read_recipe_headline,
    read_run_config,
    split_recipe_words,
)
from smoltrain.config.schema import Config
from smoltrain.errors import Problem, UserError

EXAMPLE = str(Path(__file__).parents[1] / "example.yaml")
EXAMPLE_TEXT = Path(EXAMPLE).read_text(encoding="utf-8")


def problems(*overrides: str, recipe: str = EXAMPLE) -> tuple[Problem, ...]:
    with pytest.raises(UserError) as caught:
        load_config(recipe, overrides)
    return caught.value.problems


def problem(*overrides: str, recipe: str = EXAMPLE) -> Problem:
    (only,) = problems(*overrides, recipe=recipe)
    return only


def written(folder: Path, text: str, name: str = "mine.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


# --- recipes


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_loads_and_names_its_run(name: str):
    loaded = load_config(name)
    assert loaded.run_folder.parts == ("runs", name)


@pytest.mark.parametrize(("name", "path"), list_recipes().items())
def test_every_shipped_recipe_opens_with_its_name_and_a_sentence(name: str, path: Path):
    assert path.read_text(encoding="utf-8").startswith(f"# {name}: ")
    assert read_recipe_headline(path) in path.read_text(encoding="utf-8").partition("\n")[0]
    assert not read_recipe_headline(path).startswith((name, "#"))


def test_a_recipe_may_be_any_yaml_file(tmp_path: Path):
    assert load_config(written(tmp_path, EXAMPLE_TEXT)).run.name == "mine"
    assert load_config(written(tmp_path, EXAMPLE_TEXT), ["run.name="]).run.name == "mine"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("quikstart", "no such recipe: saw 'quikstart', want 'quickstart' (the nearest valid one), or a path to"),
        ("none/none", "no such recipe: saw 'none/none', want one of quickstart"),
        ("gone.yaml", f"the recipe file is missing: saw gone.yaml in {Path.cwd()}, want an existing YAML file"),
        ("/a/gone.yaml", "the recipe file is missing: saw /a/gone.yaml, want an existing YAML file"),
        ("quickstart.yaml", f"the recipe file is missing: saw quickstart.yaml in {Path.cwd()}, want 'quickstart', the"),
    ],
)
def test_a_recipe_that_does_not_exist(recipe: str, message: str):
    assert str(problem(recipe=recipe)).startswith(message)


@pytest.mark.parametrize(
    "word",
    [
        "config=my.yaml",
        "recipe=/a/my.yml",
        "config_file=my.yaml",
        "recipe=smollm2-135m",
        "config=smollm2-135m",
        "recipe=x",
    ],
)
def test_a_recipe_that_is_given_by_a_key_does_not_train_another(word: str) -> None:
    file = word.partition("=")[2]
    assert f"the recipe is not given by a key: saw {word}, want {file} as the first word" in str(problem(word))
    assert load_config(EXAMPLE, ["run.recipe=my.yaml"]).run.recipe == "my.yaml", "the key itself, spelled out"


@pytest.mark.parametrize(
    ("recipe", "file"),
    [
        ("tiny", "tiny.yaml"),
        ("down/tiny", "down/tiny.yaml"),
        ("runs/a", "runs/a/config.yaml"),
        ("a", "runs/a/config.yaml"),
    ],
)
def test_a_recipe_without_the_end_of_its_name(
    recipe: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text("", encoding="utf-8")
    assert problem(recipe=recipe).want == f"the path to its file, {file}"


@pytest.mark.parametrize(
    ("text", "what", "saw"),
    [
        ("a: [1", "the file cannot be read as YAML", "line 1: expected ',' or ']', but got '<stream end>'"),
        ("model:\n  norm: rmsnorm\n  norm: layernorm\n", "cannot be read as YAML", "line 3: the key norm stands twice"),
        ("- 1", "the file is not a recipe", "['1']"),
        ("", "the file is not a recipe", "nothing"),
        ("a: \x00", "the file cannot be read as YAML", ""),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, what: str, saw: str):
    found = problem(recipe=written(tmp_path, text))
    assert what in found.what
    assert saw in found.saw
    assert "\n" not in str(found)


def test_a_file_that_is_not_text(tmp_path: Path):
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\xff")
    assert "cannot be read as YAML" in problem(recipe=str(tmp_path / "mine.yaml")).what


# --- overrides


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("model.hidden_size=384", "model.hidden_size", 384),
        ("optimizer.eps=3e-4", "optimizer.eps", 3e-4),
        ("optimizer.beta1=0", "optimizer.beta1", 0.0),
        ("model.tie_word_embeddings=false", "model.tie_word_embeddings", False),
        ("track.wandb=off", "track.wandb", "off"),
        ("run.name=2024-01-01", "run.name", "2024-01-01"),
        ("run.name=1e5", "run.name", "1e5"),
        ("data.pattern=**/*.md", "data.pattern", "**/*.md"),
        ("sample.prompts=[hi, 3, 'a=b: c']", "sample.prompts", ("hi", "3", "a=b: c")),
        ("sample.prompts=[]", "sample.prompts", ()),
        ("engine.gradient_checkpointing=3", "engine.gradient_checkpointing", 3),
        ("engine.gradient_checkpointing=none", "engine.gradient_checkpointing", "none"),
        ("data.path=null", "data.path", None),
        ("tokenizer.separator='null'", "tokenizer.separator", "null"),
    ],
)
def test_an_override_is_yaml_read_by_the_type_of_its_field(override: str, path: str, value: object):
    found = load_config(EXAMPLE, [override])
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_phases_are_addressed_by_name():
    main, after = load_config(EXAMPLE, ["phases.continuation.lr=3e-5", "phases.main.steps=9000"]).phases
    assert (main.steps, main.lr) == (9000, 3e-3)
    assert (after.steps, after.lr) == (50, 3e-5)


def test_the_last_of_two_overrides_wins():
    assert load_config(EXAMPLE, ["run.seed=1", "run.seed=2"]).run.seed == 2


def test_a_section_that_the_recipe_leaves_out_can_be_overridden():
    assert "optimizer:" not in EXAMPLE_TEXT
    assert load_config(EXAMPLE, ["optimizer.beta2=0.99"]).optimizer.beta2 == 0.99


def test_tokenizer_is_short_for_its_name():
    tokenizer = load_config(EXAMPLE, ["tokenizer=folder", "tokenizer.separator=<s>"]).tokenizer
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.separator) == ("folder", None, "<s>")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hello", "an override is not key=value: saw 'hello', want section.key=value; change the command line"),
        ("=3", "an override is not key=value: saw '=3', want section.key=value; change the command line"),
        ("phases.mian.lr=1", "unknown key phases.mian: saw 'mian', want 'main' (the nearest valid one)"),
        ("phases.main=3", "phases.main names a whole item: saw '3', want phases.main.KEY=value"),
        ("phases.main.lr.x=3", "phases.main.lr.x goes below a plain value: saw '3.0e-3', want section.key=value"),
        ("tokenizer.name.x=3", "tokenizer.name.x goes below a plain value: saw 'bpe'"),
    ],
)
def test_an_override_that_fits_nowhere(override: str, message: str):
    assert str(problem(override)).startswith(message)


# --- what does not fit


def test_every_problem_is_reported_at_once(tmp_path: Path):
    recipe = written(tmp_path, EXAMPLE_TEXT.replace("micro_batch: 4", "micro_batch: 0") + "x: 1\n")
    overrides = ("hello", "phases.mian.lr=1", "model.hiden_size=3", "phases.main.lr=fast", "model.mlp=relu")
    assert [found.what for found in problems(*overrides, recipe=recipe)] == [
        "an override is not key=value",
        "unknown key phases.mian",
        "model.mlp is not valid",
        "unknown key model.hiden_size",
        "batch.micro_batch is not valid",
        "phases.main.lr is not valid",
        "unknown key x",
    ]


def test_problems_of_overrides_and_of_contradictions_come_together():
    assert len(problems("hello", "run.stop_after=never", "init.load=all")) == 3


# --- there and back


@pytest.mark.parametrize("name", list_recipes())
def test_a_resolved_config_reads_back_equal(tmp_path: Path, name: str):
    resolved = load_config(name)
    path = written(tmp_path, config_to_yaml(resolved), "config.yaml")
    assert read_run_config(tmp_path / "config.yaml") == load_config(path) == resolved
    plain = yaml.safe_dump(resolved.model_dump(mode="json") | {"provenance": {"git": "abc"}})
    written(tmp_path, plain, "config.yaml")
    assert read_run_config(tmp_path / "config.yaml") == resolved


@given(
    prompts=st.lists(st.text(st.characters(exclude_categories=["Cs"]))),
    separator=st.sampled_from(["off", "null", "~", "", "1e5", "0x10", "2024-01-01", "a: b", "# c", "[SEP]", "*x", "é"]),
    lr=st.floats(min_value=1e-300, max_value=1e300),
)
def test_any_text_and_number_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, prompts: list[str], separator: str, lr: float
):
    tree = load_config(EXAMPLE).model_dump()
    tree["sample"]["prompts"] = prompts
    tree["tokenizer"]["separator"] = separator
    tree["phases"][0]["lr"] = lr
    resolved = Config.model_validate(tree)
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    path.write_text(config_to_yaml(resolved), encoding="utf-8", newline="")
    assert read_run_config(path) == resolved


def test_a_damaged_config_is_a_user_error(tmp_path: Path):
    written(tmp_path, config_to_yaml(load_config(EXAMPLE)).replace("hidden_size: 192", "hidden_size: x"), "c.yaml")
    with pytest.raises(UserError, match=r"model\.hidden_size in c\.yaml"):
        read_run_config(tmp_path / "c.yaml")


def test_a_config_without_a_phase_is_read_by_nobody(tmp_path: Path):
    text = config_to_yaml(load_config(EXAMPLE))
    written(tmp_path, text[: text.index("phases:")] + "phases: []\n", "c.yaml")
    with pytest.raises(UserError, match=r"there is no phase.*phases in c\.yaml"):
        read_run_config(tmp_path / "c.yaml")


def test_a_runs_own_config_without_steps_is_damaged(tmp_path: Path):
    text = config_to_yaml(load_config(EXAMPLE))
    for there in ("", "  tokens: 5\n"):
        (tmp_path / "c.yaml").write_text(text.replace("  steps: 50\n  tokens: null\n", there))
        with pytest.raises(UserError, match=r"phases\.continuation\.steps is missing: saw nothing.* in c\.yaml"):
            read_run_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("words", "world", "rows"),
    [
        (["batch.rows_per_step=32", "batch.micro_batch=32"], 1, 32),
        (["batch.rows_per_step=32", "batch.micro_batch=32"], 8, 4),
        (["batch.rows_per_step=32", "batch.micro_batch=8"], 2, 8),
        (["batch.rows_per_step=32", "batch.micro_batch=32"], 3, 32),  # which do not divide them
        (["batch.rows_per_step=2", "batch.micro_batch=4"], 4, 4),
        (["batch.accumulation=1", "batch.micro_batch=32"], 8, 32),
    ],
)
def test_a_rank_with_fewer_rows_than_a_micro_batch_takes_these(words: list[str], world: int, rows: int):
    config = load_config(EXAMPLE, words)
    cut = cut_micro_batch(config, 32 if "batch.rows_per_step=2" not in words else 2, world)
    assert cut.batch.micro_batch == rows
    assert cut.model_copy(update={"batch": config.batch}) == config


# --- options of `smoltrain generate`


def test_given_options_revise_the_settings():
    settings = load_config(EXAMPLE).generation
    assert override_generation(settings, temperature=None, top_k=None) == settings
    revised = override_generation(settings, temperature=0.5, top_k=None, max_tokens=7)
    assert revised.model_dump() == settings.model_dump() | {"temperature": 0.5, "max_tokens": 7}


def test_bad_options_name_themselves():
    with pytest.raises(UserError) as caught:
        override_generation(load_config(EXAMPLE).generation, temperature=-1, top_p=2)
    assert [str(p) for p in caught.value.problems] == [
        "generation.temperature is not valid: saw -1, want greater than or equal to 0; change --temperature",
        "generation.top_p is not valid: saw 2, want less than or equal to 1; change --top-p",
    ]


def test_a_runs_own_config_is_a_recipe(tmp_path: Path):
    settings = load_config(EXAMPLE)
    path = tmp_path / "config.yaml"
    path.write_text(config_to_yaml(settings) + "provenance: {rows_per_step: 8}\n")
    assert load_config(str(path)) == settings


def test_a_wrong_value_does_not_hide_a_broken_rule():
    with pytest.raises(UserError) as caught:
        load_config(EXAMPLE, ["nonsense", "optimizer.beta1=x", "batch.sequence_length=1024", "model.hidden_size=100"])
    assert [str(problem).partition(":")[0] for problem in caught.value.problems] == [
        "an override is not key=value",
        "optimizer.beta1 is not valid",
        "the heads do not divide the width",
        "the sequence is longer than the positions",
    ]


@pytest.mark.parametrize(
    ("words", "recipe", "overrides"),
    [
        ([], "quickstart", []),
        (["smollm2-135m"], "smollm2-135m", []),
        (["my.yaml", "run.name=x"], "my.yaml", ["run.name=x"]),
        (["run.name=x", "run.seed=1"], "quickstart", ["run.name=x", "run.seed=1"]),
        (["lr=1e-3"], "quickstart", ["lr=1e-3"]),
        (["--run.name=x"], "quickstart", ["--run.name=x"]),
        (["sweep/lr=1e-3/config.yaml"], "sweep/lr=1e-3/config.yaml", []),
        (["./lr=1e-3.yaml", "run.name=x"], "./lr=1e-3.yaml", ["run.name=x"]),
    ],
)
def test_the_first_word_is_the_recipe_unless_it_is_an_override(words: list[str], recipe: str, overrides: list[str]):
    assert split_recipe_words(words) == (recipe, overrides)


@pytest.mark.parametrize("word", ["-", "/dev/stdin", "/dev/null"])
def test_a_recipe_is_a_file_and_no_stream(word: str) -> None:
    assert split_recipe_words([word, "run.seed=1"]) == (word, ["run.seed=1"])
    assert problem(recipe=word).what == "a recipe is not read from a stream"
