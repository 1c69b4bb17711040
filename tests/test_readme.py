"""README.md's claims: its commands are calls that work, its names exist, its numbers are the project's own."""

import importlib
import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import typer
import yaml
from typer.core import TyperGroup

from smoltrain.cli import app, main
from smoltrain.config.load import DS_CONFIGS_FOLDER, config_to_yaml, list_recipes, load_config
from smoltrain.config.rules import find_contradictions
from smoltrain.config.schema import Config, ModelSection, PhaseSection, Section
from smoltrain.errors import BAD_INPUT, DONE, FAULT, INTERRUPTED, STOPPED, UserError, format_error

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
QUOTED = re.findall(r"`([^`\n]+)`", FENCE.sub("", README))
YOURS = {"my.yaml", "input.txt"}  # stand for files of the reader's own
SCRIPT = "launch/train.py"
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
LARGEST_KB = 400


def section(title: str) -> str:
    """The text under one `## title`."""
    _, found, rest = README.partition(f"\n## {title}\n")
    assert found, f"no section {title!r}"
    return rest.partition("\n## ")[0]


def commands() -> list[list[str]]:
    """The words of every command fenced as sh, which may have several lines, without its comment."""
    texts = [text.replace("\\\n", " ") for kind, text in FENCE.findall(README) if kind == "sh"]
    lines = [line for text in texts for line in text.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def called(*programs: str) -> list[list[str]]:
    found = [words for words in commands() if words[0] in programs]
    assert found, f"README shows no call of {programs}"
    return found


def options(verb: str, words: list[str]) -> dict[str, Any]:
    """The parameters of a verb as its command line reads them; a wrong call raises."""
    command = typer.main.get_command(app)
    words = [verb, *words]
    while isinstance(command, TyperGroup):
        command = command.commands[words.pop(0)]
    return command.make_context(verb, words).params


def load_words(recipe: str, overrides: list[str]) -> None:
    """Load what a training command names, but for what stands for the reader's own file."""
    if recipe not in YOURS:
        assert recipe in list_recipes(), f"{recipe} is not shipped"
        load_config(recipe, overrides)
        return
    assert all("=" in word for word in overrides)


def joined(words: list[str]) -> str:
    return " ".join(words)


# --- commands


def test_every_command_is_looked_at_below():
    known = {"smoltrain", "./train.sh", "./tests/run.sh", "deepspeed", "torchrun", "python", "sbatch", "pip", "source"}
    assert {words[0] for words in commands()} == known


@pytest.mark.parametrize("words", called("./train.sh", "./tests/run.sh"), ids=joined)
def test_a_script_is_there_and_may_be_executed(words: list[str]):
    assert (ROOT / words[0]).stat().st_mode & 0o111


@pytest.mark.parametrize("words", called("smoltrain"), ids=joined)
def test_a_call_of_smoltrain_is_valid(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    _, verb, *rest = words
    given = options(verb, rest)
    if verb in ("recipes", "show", "estimate"):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as left:
            main([verb, *rest])
        assert left.value.code == DONE
        assert capsys.readouterr().out
    else:
        assert verb in ("train", "generate", "plot", "export", "push", "demo", "verify", "prepare")
        assert given.get("recipe", given.get("run")) in list_recipes() or verb == "verify"


@pytest.mark.parametrize("words", called("sbatch"), ids=joined)
def test_a_job_is_there_and_its_recipe_loads(words: list[str]):
    assert (ROOT / words[1]).is_file()  # tests/whole_runs/test_slurm.py runs it
    load_words(words[2], words[3:])


@pytest.mark.parametrize("words", called("./train.sh"), ids=joined)
def test_a_call_of_train_sh_is_valid(words: list[str]):
    rest = words[1:]
    if not rest or "=" in rest[0] or rest[0].startswith("-"):  # as train.sh does
        rest = ["quickstart", *rest]
    given = options("train", rest)
    load_words(given["recipe"], list(given["overrides"] or []))


LAUNCHES = [words for words in called("deepspeed", "torchrun", "python") if SCRIPT in words]


@pytest.mark.parametrize("words", LAUNCHES, ids=joined)
def test_a_direct_launch_is_valid(words: list[str]):
    at = words.index(SCRIPT)
    launcher, (recipe, *overrides) = words[:at], words[at + 1 :]
    if launcher[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        assert get_args_parser().parse_args(words[1:]).training_script == SCRIPT
    elif launcher[0] == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        assert parse_args(words[1:]).user_script == SCRIPT
    else:
        assert launcher == ["python"]
    load_words(recipe, overrides)


@pytest.mark.slow
@pytest.mark.parametrize("words", [words for words in LAUNCHES if "--nnodes" not in words], ids=joined)
def test_a_direct_launch_trains_in_a_fresh_shell(words: list[str], tmp_path: Path):
    """As printed, after the line that README prints for a shell; but with two ranks for 8, and few steps."""
    ((source, script),) = called("source")
    words = ["2" if word == "8" else word for word in words]
    words += [f"run.folder={tmp_path}", "run.stop_after=main", "track.wandb=off", "sample.every=0", "evaluate.rows=2"]
    words += ["phases.main.steps=1", "phases.main.warmup_steps=0", "data.pattern=plays/histories/*.md"]
    environment = {"HOME": os.environ["HOME"], "PATH": "/usr/local/bin:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    environment |= {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}  # deepspeed counts its devices
    shell = ["bash", "-c", f"{source} {script} && exec {shlex.join(words)}"]
    done = subprocess.run(shell, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == DONE, done.stdout + done.stderr
    assert "step 1/1 main" in done.stdout


@pytest.mark.parametrize("words", [words for words in called("python") if words[1] == "-m"], ids=joined)
def test_a_benchmark_is_there_and_its_words_are_valid(words: list[str]):
    module = importlib.import_module(words[2])
    (benchmark,) = [value for name, value in vars(module).items() if name.startswith("benchmark_")]
    app = typer.Typer()
    app.command()(benchmark)
    context = typer.main.get_command(app).make_context(words[2], words[3:])
    assert context.params.get("recipe", "quickstart") in list_recipes()


@pytest.mark.parametrize("words", called("pip"), ids=joined)
def test_a_call_of_pip_installs_what_is_there(words: list[str]):
    """tests/test_wheel.py builds and uses the wheel."""
    assert words[1] in ("wheel", "install")
    assert words[-1].partition("[")[0] == "."
    assert set(re.findall(r"[a-z]\w*", words[-1])) <= set(EXTRAS)


def test_every_extra_is_named_with_what_it_brings():
    rows = dict(re.findall(r"^\| (`.+`) \| (.+) \| .+ \|$", section("As a package"), re.MULTILINE))
    named = {
        name: library
        for names, libraries in rows.items()
        for name, library in zip(names.replace("`", "").split(", "), libraries.split(", "), strict=True)
    }
    wanted = {name: re.split(r"[>=]", brings[0])[0] for name, brings in EXTRAS.items() if name != "dev"}
    assert named == wanted


@pytest.mark.parametrize("line", re.findall(r"^error: .*$", section("Recipes"), re.MULTILINE))
def test_an_error_line_is_what_load_reports(line: str):
    (key,) = re.findall(r"unknown key ([\w.]+):", line)
    with pytest.raises(UserError) as caught:
        load_config("quickstart", [f"{key}=512"])
    assert format_error(caught.value) == line


def test_there_is_an_error_line():
    assert "\nerror: unknown key " in section("Recipes")


# --- names


def test_every_path_exists():
    paths = {word for word in QUOTED if re.fullmatch(r"(\./)?[\w.*-]+/[\w./*-]*", word)}
    paths = {p for p in paths if not p.startswith((".venv/", "runs/", "OWNER/"))}  # made by train.sh, or the reader's
    folders = r"(?<![\w/.])(?:smoltrain|launch|tests|docs|ds_configs|\.ci)/[\w./-]*\w"
    paths |= {name for _, text in FENCE.findall(README) for name in re.findall(folders, text)}
    assert {"launch/train.py", "smoltrain/run/track.py", "ds_configs/", "tests/model/"} <= paths
    assert [path for path in sorted(paths) if not list(ROOT.glob(path))] == []


@pytest.mark.parametrize("name", ["CHANGELOG.md", "CONTRIBUTING.md", "docs/decisions.md", "LICENSE"])
def test_a_page_is_linked_and_there(name: str):
    assert f"]({name})" in README
    assert (ROOT / name).stat().st_size > 0


def test_every_picture_and_page_it_links_is_there():
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", README) if "://" not in link]
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_what_the_arrows_name_is_in_the_files():
    """Each step of the line is defined where the line says, and what stands before it calls it or starts it."""
    arrows = re.findall(r"^  -> (smoltrain/\S+\.py): (\w+)", README, re.MULTILINE)
    assert len(arrows) >= 5
    before = (ROOT / "train.sh").read_text(encoding="utf-8")
    for path, name in arrows:
        source = (ROOT / path).read_text(encoding="utf-8")
        assert f"def {name}(" in source, f"{path} has no {name}"
        module = path.removesuffix(".py").replace("/", ".")
        assert any(way in before for way in (f"{name}(", module, "smoltrain train")), f"{name} is not called"
        before = source
    assert "\nMETRICS = {" in (ROOT / "smoltrain" / "run" / "track.py").read_text(encoding="utf-8")


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
    assert named - fields == {"tokenizer.json"}, "that one is a file"


@pytest.mark.parametrize("words", [w for w in QUOTED if re.fullmatch(r"[a-z_]+\.[\w.]+=[\w.]+", w)])
def test_every_override_loads(words: str):
    if words != "section.key=value":
        load_config("quickstart", [words])


def test_every_ds_config_is_named():
    (listed,) = re.findall(r"`ds_configs/`\s+\(([\w,\s]+)\)", README)
    assert sorted(listed.replace(",", " ").split()) == sorted(path.stem for path in DS_CONFIGS_FOLDER.glob("*.json"))


def test_the_exit_codes_are_those_of_errors():
    rows = {int(code): meaning for code, meaning in re.findall(r"^\| (\d+) \| (.+) \|$", README, re.MULTILINE)}
    wanted = {DONE: "done", FAULT: "a fault", BAD_INPUT: "bad input", STOPPED: "stopped"}
    wanted[INTERRUPTED] = "Ctrl-C"
    assert rows.keys() == wanted.keys()
    assert all(meaning.startswith(wanted[code]) for code, meaning in rows.items())
    assert f"exit with {STOPPED}." in section("Resume")


def test_every_message_of_the_troubleshooting_is_in_the_code():
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "smoltrain").rglob("*.py"))
    plain = re.sub(r"\{[^{}\n]*\}", "N", source)  # f"step {step}" -> "step N"
    messages = re.findall(r"^\| `([^`]+)` \|", section("Troubleshooting"), re.MULTILINE)
    assert len(messages) >= 6
    for message in messages:
        pieces = [piece.strip() for piece in message.removesuffix(" is nan").split("...")]
        assert all(piece in plain for piece in pieces), message
    variables = set(re.findall(r"`([A-Z_]{6,})(?:=N)?`", section("Troubleshooting")))
    assert variables == {"SMOLTRAIN_THREADS", "CUDA_LAUNCH_BLOCKING", "MASTER_PORT", "WORLD_SIZE"}
    read = ('os.environ.get("{}"', '_number(environment, "{}"')
    assert all(any(how.format(name) in source for how in read) for name in variables)


def test_the_corpus_is_the_pinned_one():
    (pinned,) = re.findall(r"pip install --no-deps (\S+)`", README)
    assert pinned in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()


# --- what it says of quickstart and of phases


def test_quickstart_is_what_it_is_said_to_be():
    from smoltrain.checkpoint.manifest import step_folder
    from smoltrain.launch.supervisor import CPU_RANKS
    from smoltrain.model.build import build_model, count_parameters

    said = " ".join(section("What you see").split())
    recipe = load_config("quickstart")
    main, after = recipe.phases
    parameters = count_parameters(build_model(recipe.model, device="meta"))
    assert ("of two million parameters" in said, round(parameters / 1e6, 1)) == (True, 2.0)
    assert ("two ranks, ZeRO-2, bf16" in said, CPU_RANKS) == (True, 2)
    assert (recipe.engine.ds_config, recipe.engine.precision) == ("zero2", "bf16")
    assert f"accumulation {recipe.batch.accumulation}, gradient checkpointing" in said
    assert recipe.engine.gradient_checkpointing == "full"
    assert f"a main phase and a {after.name} of {after.steps} steps" in said
    assert f"{step_folder(Path('checkpoints'), main.num_steps).name}/" in said


def test_the_phases_shown_are_phases(tmp_path: Path):
    ((kind, text),) = FENCE.findall(section("Phases"))
    assert kind == "yaml"
    shown = yaml.safe_load(text)["phases"]
    phases = tuple(PhaseSection.model_validate(phase) for phase in shown)
    whole = load_config("quickstart").model_copy(update={"phases": phases})
    assert find_contradictions(whole) == []
    recipe = yaml.safe_load(config_to_yaml(whole)) | {"phases": shown}
    (tmp_path / "shown.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert load_config(str(tmp_path / "shown.yaml")).phases == phases


def test_the_schedules_named_are_all_there_are():
    named = section("Phases").partition("pure functions of the step:")[2].partition("No scheduler state")[0]
    assert set(re.findall(r"`(\w+)`", named)) == set(get_args(PhaseSection.model_fields["schedule"].annotation))


# --- what is shipped


def test_no_tracked_file_is_large():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    git = ["git", "-c", "safe.directory=*", "-C", str(ROOT), "ls-files", "-z"]
    names = subprocess.run(git, capture_output=True, text=True, check=True).stdout.split("\0")
    files = [ROOT / name for name in names if name and (ROOT / name).is_file()]
    assert ROOT / "README.md" in files
    assert [path for path in files if path.stat().st_size > LARGEST_KB * 1000] == []
