"""What the pages of docs/ say of the project is so: keys, messages, numbers, schedules, extras, exit codes."""

import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest
import yaml

from smoltrain.config.keys import suggest_key
from smoltrain.config.load import DS_CONFIGS_FOLDER, config_to_yaml, list_recipes, load_config
from smoltrain.config.rules import find_contradictions
from smoltrain.config.schema import Config, ModelSection, PhaseSection, Section
from smoltrain.engine.optimizer import checkpoint_bytes
from smoltrain.errors import BAD_INPUT, DONE, FAULT, INTERRUPTED, STOPPED, UserError, format_error
from smoltrain.estimate.constants import GIB
from smoltrain.estimate.memory import estimate_memory
from smoltrain.estimate.training_setup import build_training_setup
from smoltrain.new_recipe import hyperparameters, shape, text
from smoltrain.training import preflight

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
TASKS = (
    "first-run", "data", "new-recipe", "choosing", "clusters", "checkpoints", "wandb", "export", "troubleshooting",
    "estimate", "recipes", "performance", "security", "architecture", "optimizers", "watching",
)  # fmt: skip
TEN_MINUTES = 2200  # words, at 220 a minute


def text_of(page: str) -> str:
    return (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")


def section(page: str, title: str) -> str:
    """The text under one `## title` of a page."""
    _, found, rest = text_of(page).partition(f"\n## {title}\n")
    assert found, f"no section {title!r}"
    return rest.partition("\n## ")[0]


def quoted_in(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


QUOTED = [word for page in ("../README", *TASKS) if page != "performance" for word in quoted_in(text_of(page))]


@pytest.mark.parametrize("page", TASKS)
def test_a_page_is_read_in_ten_minutes(page: str):
    assert len(FENCE.sub("", text_of(page)).split()) <= TEN_MINUTES


def test_every_extra_is_named_with_what_it_brings():
    rows = dict(re.findall(r"^\| (`.+`) \| (.+) \| .+ \|$", section("first-run", "As a package"), re.MULTILINE))
    named = {}
    for names, libraries in rows.items():
        extras = names.replace("`", "").split(", ")
        brought = [libraries] if len(extras) == 1 else libraries.split(", ")
        named |= dict(zip(extras, brought, strict=True))
    wanted = {
        name: ", ".join(re.split(r"[>=\[]", library)[0] for library in brings)
        for name, brings in EXTRAS.items()
        if name != "dev"
    }
    assert named == wanted


@pytest.mark.parametrize("extra", ["flash", "gpu"])
@pytest.mark.parametrize("page", ["clusters", "troubleshooting", "choosing"])
def test_the_extras_of_a_gpu_are_named_where_a_user_meets_them(page: str, extra: str):
    assert re.search(rf"`{extra}`|\[[\w,]*\b{extra}\b[\w,]*\]", text_of(page))


def test_no_package_of_our_name_is_advised_from_an_index():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "smoltrain").rglob("*.py")]
    advice = re.compile(r"pip install [\"']?smoltrain\b(?!-VERSION)")
    wrong = [path.name for path in pages if path.name != "CHANGELOG.md" and advice.search(path.read_text("utf-8"))]
    assert wrong == []


@pytest.mark.parametrize("line", re.findall(r"^error: .*$", text_of("new-recipe"), re.MULTILINE))
def test_an_error_line_is_what_load_reports(line: str):
    (key,) = re.findall(r"unknown key ([\w.]+):", line)
    with pytest.raises(UserError) as caught:
        load_config("quickstart", [f"{key}=512"])
    assert format_error(caught.value) == line


def test_there_is_an_error_line():
    assert "\nerror: unknown key " in text_of("new-recipe")


def test_every_key_is_one_of_the_config():
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    sections["model"] = ModelSection
    fields = {
        f"{name}.{field.alias or key}"
        for name, annotation in sections.items()
        if isinstance(annotation, type) and issubclass(annotation, Section)
        for key, field in annotation.model_fields.items()
    } | {f"phases.*.{key}" for key in PhaseSection.model_fields}
    names = "|".join(Config.model_fields)
    named = {word for word in QUOTED if re.fullmatch(rf"({names})\.[\w.*]+", word)}
    assert {"engine.ds_config", "run.name", "track.wandb_timeout_s", "phases.*.lr"} <= named
    files = {word for word in named if word.endswith((".json", ".jsonl", ".safetensors"))}
    assert named - fields - files == set()


@pytest.mark.parametrize("words", [w for w in QUOTED if re.fullmatch(r"[a-z_]+\.[\w.]+=[\w.]+", w)])
def test_every_override_loads(words: str):
    if words != "section.key=value":
        load_config("quickstart", [words])


def test_every_ds_config_is_named():
    (listed,) = re.findall(r"`ds_configs/`\s+\(([\w,\s]+)\)", text_of("clusters"))
    assert sorted(listed.replace(",", " ").split()) == sorted(path.stem for path in DS_CONFIGS_FOLDER.glob("*.json"))


def test_the_exit_codes_are_those_of_errors():
    rows = {
        int(code): meaning
        for code, meaning in re.findall(r"^\| (\d+) \| (.+) \|$", text_of("troubleshooting"), re.MULTILINE)
    }
    wanted = {DONE: "done", FAULT: "a fault", BAD_INPUT: "bad input", STOPPED: "stopped"}
    wanted[INTERRUPTED] = "Ctrl-C"
    assert rows.keys() == wanted.keys()
    assert all(meaning.startswith(wanted[code]) for code, meaning in rows.items())
    assert f"exit with {STOPPED}." in " ".join(text_of("checkpoints").split())


def test_every_message_of_the_troubleshooting_is_in_the_code():
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "smoltrain").rglob("*.py"))
    plain = re.sub(r"\{[^{}\n]*\}", "N", source)  # f"step {step}" -> "step N"
    messages = re.findall(r"^\| `([^`]+)` \|", text_of("troubleshooting"), re.MULTILINE)
    assert len(messages) >= 6
    for message in messages:
        pieces = [piece.strip() for piece in message.removesuffix(" is nan").split("...")]
        assert all(piece in plain for piece in pieces), message
    variables = set(re.findall(r"`([A-Z_]{6,})(?:=N)?`", text_of("troubleshooting")))
    assert variables == {"SMOLTRAIN_THREADS", "CUDA_LAUNCH_BLOCKING", "MASTER_PORT", "WORLD_SIZE"}
    read = ('os.environ.get("{}"', '_number(environment, "{}"')
    assert all(any(how.format(name) in source for how in read) for name in variables)


def test_the_corpus_is_the_pinned_one():
    (pinned,) = re.findall(r"pip install --no-deps (\S+)`", text_of("troubleshooting"))
    assert pinned in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()


def test_quickstart_is_what_it_is_said_to_be():
    from smoltrain.checkpoint.manifest import step_folder
    from smoltrain.launch.supervisor import CPU_RANKS
    from smoltrain.model.build import build_model, count_parameters

    said = " ".join(section("first-run", "What you see").split())
    recipe = load_config("quickstart")
    main, after = recipe.phases
    parameters = count_parameters(build_model(recipe.model, device="meta"))
    assert ("of two and a half million parameters" in said, round(parameters / 1e6, 1)) == (True, 2.5)
    assert ("two ranks, ZeRO-2" in said, CPU_RANKS) == (True, 2)
    assert (recipe.engine.ds_config, recipe.engine.precision) == ("zero2", "auto")
    assert ("Muon" in said, recipe.optimizer.kind) == (True, "muon")
    assert f"accumulation {recipe.batch.accumulation}," in said
    assert "no gradient checkpointing" in said
    assert recipe.engine.gradient_checkpointing == "none"
    assert f"a main phase and a {after.name} of {after.steps} steps" in said
    assert f"{step_folder(Path('checkpoints'), main.steps or 0).name}/" in section("first-run", "What it wrote")


def test_the_phases_shown_are_phases(tmp_path: Path):
    ((kind, text),) = FENCE.findall(section("new-recipe", "Phases"))
    assert kind == "yaml"
    shown = yaml.safe_load(text)["phases"]
    phases = tuple(PhaseSection.model_validate(phase) for phase in shown)
    whole = load_config("quickstart").model_copy(update={"phases": phases})
    assert find_contradictions(whole) == []
    recipe = yaml.safe_load(config_to_yaml(whole)) | {"phases": shown}
    (tmp_path / "shown.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert load_config(str(tmp_path / "shown.yaml")).phases == phases


def test_the_schedules_named_are_all_there_are():
    named = (
        section("new-recipe", "Phases").partition("pure functions of the step:")[2].partition("No scheduler state")[0]
    )
    assert set(re.findall(r"`(\w+)`", named)) == set(get_args(PhaseSection.model_fields["schedule"].annotation))


# --- what it says of plans


def test_the_rules_of_new_are_those_of_the_code():
    rules = section("choosing", "The rules of `smoltrain new`")
    (rate, of_n, of_d), (batch, of_tokens) = hyperparameters.STEP_LAW_RATE, hyperparameters.STEP_LAW_BATCH
    widths = f"{shape.SMALL_HEAD} wide below {shape.LARGE_HEAD_FROM / 1e9:g}B parameters, {shape.LARGE_HEAD} from there"
    lengths = [f"{length:,}" for _, length in hyperparameters.ROW_LENGTHS]
    sizes = [f"{size / 1e6:g}M" for size, _ in hyperparameters.ROW_LENGTHS]
    wanted = [
        f"{hyperparameters.TOKENS_PER_PARAMETER} a parameter, at most {hyperparameters.MAX_EPOCHS} epochs",
        f"{batch:g} D^{of_tokens:g} tokens",
        f"{rate:g} N^{of_n:g} D^{of_d:g}, at most 3e-3",
        f"{', '.join(lengths)} or {hyperparameters.LONGEST_ROW:,} tokens below {', '.join(sizes[:2])}, {sizes[2]}",
        f"down to {hyperparameters.SHORT_ROW}, so that a step has {hyperparameters.LEAST_ROWS} rows",
        f"{hyperparameters.LEAST_WARMUP} to {hyperparameters.MOST_WARMUP:,} steps, at most a tenth",
        f"{hyperparameters.BETA1}, {hyperparameters.BETA2}, {hyperparameters.CLIPPING}, {hyperparameters.WEIGHT_DECAY}",
        widths,
        f"the token table below {shape.UNTIED_FROM / 1e9:g}B",
        f"V ln V <= tokens / {text.SEEN_PER_ID}; at most {shape.TABLE_SHARE:.0%}".replace("%", " %"),
        f"at most {text.MOST_IDS:,}",
    ]
    assert [words for words in wanted if words not in rules] == []
    assert (hyperparameters.HIGHEST_RATE, hyperparameters.FINAL_RATE) == (3e-3, 1e-5)
    for _, aspect in shape.PUBLISHED_ASPECTS:
        assert f"({aspect:.3g})" in rules


def test_the_ratios_of_a_plan_are_those_that_a_start_prints():
    said = " ".join(section("choosing", "Tokens").split())
    assert f"compute-optimal are about {preflight.COMPUTE_OPTIMAL_TOKENS};" in said
    assert f"up to about {preflight.EPOCHS_TO_WARN} a token" in said
    assert f"warns above {preflight.EPOCHS_TO_WARN} epochs" in said


def test_what_an_optimizer_costs_is_what_the_estimate_says():
    rows = re.findall(
        r"^\| (.+) \| ([\d.]+) GiB \| ([\d.]+) GiB \|$", section("optimizers", "What it costs"), re.MULTILINE
    )
    said = {what: numbers for what, *numbers in rows}
    wanted: dict[str, list[str]] = {"smollm2-135m: masters and state": [], "a checkpoint of it": []}
    for kind in ("adamw", "muon"):
        setup = build_training_setup(load_config("smollm2-135m", [f"optimizer={kind}"]), world=1, device="cpu")
        hidden = setup.shape.hidden_parameters
        size = checkpoint_bytes(setup.optimizer, hidden, setup.shape.parameters - hidden, setup.weight_bytes)
        wanted["smollm2-135m: masters and state"].append(f"{estimate_memory(setup)['optimizer'] / GIB:.2f}")
        wanted["a checkpoint of it"].append(f"{size / GIB:.2f}")
    assert said == wanted


def test_the_rate_of_another_trainer_is_answered_with_the_one_to_begin_with():
    assert "nanochat's `matrix_lr`" in " ".join(section("optimizers", "Which rate to begin with").split())
    assert (suggest_key("matrix_lr") or "").startswith("phases.*.lr, the rate of the other parameters too")


def test_all_recipes_but_quickstart_say_the_rows_of_a_step_outright():
    assert "as all but `quickstart` do" in " ".join(text_of("clusters").split())
    assert {name for name in list_recipes() if load_config(name).batch.rows_per_step is None} == {"quickstart"}


def test_the_phase_by_which_a_run_is_trained_longer_fits_into_what_show_prints(tmp_path: Path):
    fences = dict(FENCE.findall(section("new-recipe", "Train a finished run longer")))
    shown = config_to_yaml(load_config("quickstart"))
    longer = tmp_path / "longer.yaml"
    longer.write_text(shown.replace("\nevaluate:\n", f"\n{fences['yaml']}evaluate:\n"), encoding="utf-8")
    assert "smoltrain show quickstart > longer.yaml" in fences["sh"]
    config = load_config(str(longer))
    assert [phase.name for phase in config.phases] == ["main", "continuation", "more"]
    assert config.run_folder == load_config("quickstart").run_folder, "the same run"
