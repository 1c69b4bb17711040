"""The command: what each verb prints and calls, and how mistakes end."""

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY

import pytest
import typer

from smoltrain import __version__, cli
from smoltrain.config.load import list_recipes, load_config, read_recipe_headline
from smoltrain.errors import Problem, TrainingStopped, UserError

EXAMPLE = str(Path(__file__).parent / "example.yaml")
COMMAND = str(Path(sys.executable).parent / "smoltrain")
Run = Callable[..., tuple[int, str, str]]
VERBS = [
    *["new", "train", "tune"],
    *["recipes", "show", "explain", "estimate", "doctor", "check-hosts"],
    *["runs", "watch", "summary", "plot", "report", "compare", "profile", "verify"],
    *["perplexity", "eval", "memorisation"],
    *["generate", "chat", "demo", "export", "push"],
]
EVALUATE_KEYS = [
    "evaluate.memorisation_every",
    "evaluate.rows",
    "evaluate.tasks",
    "evaluate.tasks_every",
    "evaluate.tasks_limit",
]
PREPARE_VERBS = ["prepare tokenizer", "prepare data"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """run("show", ...) is (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main(list(arguments))
        assert isinstance(left.value.code, int)
        told = capsys.readouterr()
        return left.value.code, told.out, told.err

    return run


# --- help and mistakes


@pytest.mark.parametrize("verb", [*VERBS, *PREPARE_VERBS])
def test_each_verb_has_an_example_in_80_columns(run: Run, verb: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(*verb.split(), "-h")
    assert code == 0
    assert f"Example: smoltrain {verb}" in out or verb == "push"  # which has a variable in front
    assert [line for line in out.splitlines() if len(line.rstrip()) > 80] == []
    command = find_command(verb)
    texts = [command.help, command.epilog, *(parameter.help for parameter in command.params)]
    cut = {word for text in texts for word in text.split()} - set(out.replace("│", " ").split())
    assert cut == set(), "words that a line ends within"


def find_command(verb: str) -> Any:
    command: Any = typer.main.get_command(cli.app)
    for word in verb.split():
        command = command.commands[word]
    return command


def test_the_verbs_above_are_all():
    commands: Any = typer.main.get_command(cli.app)
    names = [*commands.commands, *(f"prepare {name}" for name in find_command("prepare").commands)]
    assert sorted(names) == sorted([*VERBS, *PREPARE_VERBS, "prepare"])


@pytest.mark.parametrize("verb", ["train", "tune", "show", "estimate", "prepare data"])
def test_help_tells_where_the_keys_are_explained(run: Run, verb: str):
    assert "smoltrain explain" in " ".join(run(*verb.split(), "-h")[1].replace("│", " ").split())


@pytest.mark.parametrize("verb", ["generate", "chat", "export", "demo", "verify"])
def test_help_tells_what_may_be_named(run: Run, verb: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "400")
    _, out, _ = run(verb, "--help")
    assert "the folder of a checkpoint" in out
    assert ("or a Hugging Face folder." in out) == (verb != "verify")


def test_the_command_and_the_module_tell_the_version():
    for words in ([COMMAND], [sys.executable, "-m", "smoltrain"]):
        done = subprocess.run([*words, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout == f"smoltrain {__version__}\n"


def test_without_a_verb_there_is_help_in_panels(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run()
    assert (code, err) == (0, "")
    assert out == run("-h")[1]
    shown = [line.strip("╭─╮ ") for line in out.splitlines() if line.startswith("╭─")]
    assert shown == ["Options", *cli.PANELS]
    verbs = [line.split()[1] for line in out.splitlines() if re.match(r"│ [a-z]", line)]
    assert verbs == [*VERBS, "prepare"]
    assert set(verbs) <= {verb for panel in cli.PANELS.values() for verb in panel}
    assert run("prepare")[:2] == (0, run("prepare", "--help")[1])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trian"], "smoltrain has no such verb: saw 'trian', want 'train' (the nearest valid one)"),
        (
            ["new", "x", "--params", "2M", "--ranks", "2"],
            "smoltrain new has no such option: saw '--ranks', want --world;",
        ),
        (["quickstart"], "smoltrain has no such verb: saw 'quickstart', want train quickstart;"),
        (["summary", "gone"], "no such run: saw 'gone', want the folder of a run, or a name under runs/ ("),
        (["verify", "gone"], "no such run: saw 'gone', want the folder of a run or of its checkpoint, or a name under"),
        (["train", "--recipe", "smollm2-135m"], "the recipe is not given by a key: saw recipe=smollm2-135m, want"),
        (["prepare", "tokeniser"], "smoltrain prepare has no such verb: saw 'tokeniser', want 'tokenizer'"),
        (
            ["show"],
            "smoltrain show needs a RECIPE: saw none, want a shipped recipe's name (smoltrain recipes lists them)",
        ),
        (["explian", "lr"], "smoltrain has no such verb: saw 'explian', want 'explain'"),
        (["explain", "stps"], "no such key or section: saw 'stps', want phases.NAME.steps"),
        (
            ["generate", "x", "--temprature", "1"],
            "smoltrain generate has no such option: saw '--temprature', want '--temp",
        ),
        (["train", "quickstart", "--ranks", "two"], "--ranks is not valid: saw 'two', want a whole number"),
        (["generate", "x", "--top-k", "many"], "--top-k is not valid: saw 'many', want a whole number"),
        (["recipes", "all"], "smoltrain recipes cannot be called like this: saw too many words: (all)"),
        (["verify", "x", "--forward=yes"], "--forward takes no value"),
        (["demo", "x", "--port"], "--port needs a value"),
        *((["demo", "x", "--port", port], f"--port is not valid: saw '{port}'") for port in ("0", "65536", "http")),
        (["--verison"], "smoltrain has no such option: saw '--verison', want '--version' (the nearest valid one)"),
    ],
)
def test_a_wrong_call_is_one_line_and_ends_with_2(run: Run, arguments: list[str], line: str):
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {line}")


def test_each_mistake_in_a_recipe_is_one_line(run: Run):
    code, out, err = run("show", EXAMPLE, "model.hiden_size=3", "batch.micro_batch=0")
    assert (code, out) == (2, "")
    assert err == (
        "error: unknown key model.hiden_size: saw 'hiden_size', want 'hidden_size' (the nearest valid one); "
        "change model.hiden_size on the command line\n"
        "error: batch.micro_batch is not valid: saw '0', want 'auto' or greater than 0; "
        "change batch.micro_batch on the command line\n"
    )


@pytest.mark.parametrize("verb", ["recipes", "explain"])
def test_a_full_disk_is_one_line_whatever_the_verb(run: Run, verb: str, monkeypatch: pytest.MonkeyPatch):
    def write_picture(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "loss.png")

    monkeypatch.setattr("smoltrain.config.load.list_recipes", write_picture)
    monkeypatch.setattr("smoltrain.explain.explain", write_picture)
    line = "error: a file cannot be written: saw No space left on device, want some free space; change loss.png\n"
    assert run(verb) == (2, "", line)


def test_the_real_command_ends_without_a_traceback():
    ended = subprocess.run([COMMAND, "show", "quikstart"], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: no such recipe: saw 'quikstart', want 'quickstart'")
    assert ended.stderr.count("\n") == 1


def test_output_that_cannot_be_written_is_a_fault_but_a_reader_may_leave():
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run([COMMAND, "recipes"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    lost = "error: what was printed is lost: stdout cannot be written to (No space left on device)\n"
    assert (ended.returncode, ended.stderr) == (1, lost)
    reader, pipe = os.pipe()
    os.close(reader)  # as `| head -1` does
    ended = subprocess.run([COMMAND, "recipes"], stdout=pipe, stderr=subprocess.PIPE, text=True, check=False)
    os.close(pipe)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_looking_does_not_wait_for_torch():
    """The import alone reads no pydantic either, which takes a quarter of a second; no process starts for each verb."""
    code = """
import sys, smoltrain.cli
heavy = {"torch", "matplotlib", "deepspeed", "pydantic", "transformers", "wandb"}
print(*heavy & set(sys.modules))
for words in (["--help"], ["recipes"], ["explain"], ["explain", "lr"], ["runs"]):
    try:
        smoltrain.cli.main(words)
    except SystemExit as left:
        print("code", left.code)
print(*(heavy - {"pydantic"}) & set(sys.modules))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    lines = ended.stdout.splitlines()
    assert (ended.returncode, ended.stderr, lines[0], lines[-1]) == (0, "", "", "")
    assert lines.count("code 0") == 5


# --- completion


def complete(words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What bash is offered for the last of these words."""
    monkeypatch.setenv("_SMOLTRAIN_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    with pytest.raises(SystemExit) as left:
        typer.main.get_command(cli.app).main([], prog_name="smoltrain")
    assert left.value.code == 0
    return capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("smoltrain tr", ["train"]),
        ("smoltrain trian", []),
        ("smoltrain train qui", ["quickstart"]),
        ("smoltrain show smollm2-1", ["smollm2-124m", "smollm2-135m", "smollm2-135m-fast", "smollm2-135m-hf"]),
        ("smoltrain explain evaluate", ["evaluate", "evaluate.every", *EVALUATE_KEYS]),
        ("smoltrain generate fi", ["first"]),
        ("smoltrain plot ", ["first", "second"]),
        ("smoltrain generate first --top-", ["--top-k", "--top-p"]),
    ],
)
def test_a_shell_completes_verbs_recipes_keys_and_runs(
    words: str, offered: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name in ("first", "second", "no-run"):
        Path("runs", name).mkdir(parents=True)
    for name in ("first", "second"):
        Path("runs", name, "config.yaml").touch()
    assert sorted(complete(words, monkeypatch, capsys)) == offered


def test_a_script_for_the_shell_is_printed(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shellingham.detect_shell", lambda: ("bash", "/bin/bash"))  # whatever started the tests
    code, out, err = run("--show-completion")
    assert (code, err) == (0, "")
    assert "complete -o" in out


# --- recipes and show


def test_recipes_are_listed_with_their_sentence(run: Run):
    code, out, _ = run("recipes")
    assert code == 0
    for name, path in list_recipes().items():
        assert name in out
        assert read_recipe_headline(path).split()[0] in out


def test_what_show_prints_is_a_recipe(run: Run, tmp_path: Path):
    code, out, err = run("show", EXAMPLE, "phases.main.lr=3e-4", "phases.main.final_lr=0")
    assert (code, err) == (0, "")
    (tmp_path / "shown.yaml").write_text(out)
    assert load_config("shown.yaml") == load_config(EXAMPLE, ["phases.main.lr=3e-4", "phases.main.final_lr=0"])


def test_show_counts_parameters_and_tokens(run: Run):
    vocab, width, kv, mlp, layers = 2048, 192, 64, 512, 6
    block = 2 * width * width + 2 * width * kv + 3 * width * mlp + 2 * width
    _, out, _ = run("show", EXAMPLE)
    assert f"# {vocab * width + layers * block + width:,} parameters\n" in out
    assert out.endswith("# 16 rows = 2,048 tokens per step on each rank\n")
    assert f"# optimizer: adamw for {vocab * width + layers * block + width:,} parameters\n" in out
    _, out, _ = run("show", EXAMPLE, "batch.accumulation=null", "batch.rows_per_step=64")
    assert out.endswith("# 64 rows = 8,192 tokens per step over all ranks\n")


def test_show_says_that_a_share_holds_nothing_out_where_documents_are_named(run: Run, tmp_path: Path):
    said = "# data.validation_share holds nothing out: the documents to hold out are named\n"
    (tmp_path / "held.txt").write_text("held out")
    assert said in run("show", EXAMPLE, f"data.validation_path={tmp_path}/held.txt")[1]
    assert said not in run("show", EXAMPLE)[1]


def test_show_says_what_a_start_would_miss(run: Run, tmp_path: Path):
    code, out, err = run("show", EXAMPLE, "data.path=texts/*.txt")
    assert (code, err) == (0, "")
    assert out.endswith("# data.path texts/*.txt is not on this machine: a start here would be refused\n")
    (tmp_path / "texts").mkdir()
    assert "is not on this machine" not in run("show", EXAMPLE, "data.path=texts/*.txt")[1]
    assert "is not on this machine" not in run("show", EXAMPLE, "data.path=s3://bucket/texts")[1]


def test_show_says_what_muon_updates(run: Run):
    _, out, _ = run("show", EXAMPLE, "optimizer=muon")
    assert "# optimizer: muon for 42 hidden matrices (2.4M parameters), adamw for 1 table and 13 vectors (" in out
    _, out, _ = run("show", EXAMPLE, "--plan")
    assert out.startswith("optimizer adamw\nplan on one rank ")
    _, out, _ = run("show", EXAMPLE, "optimizer=muon", "embedding_lr_factor=3", "--plan")
    assert out.startswith("optimizer muon, embeddings and head at 3 x lr\nplan on one rank ")


def test_show_with_comments_is_the_same_recipe(run: Run, tmp_path: Path):
    code, out, err = run("show", EXAMPLE, "--comments", "run.seed=5")
    assert (code, err) == (0, "")
    assert "  # seeds the initial weights, dropout and the order of the data" in out
    (tmp_path / "shown.yaml").write_text(out)
    assert load_config("shown.yaml") == load_config(EXAMPLE, ["run.seed=5"])


def test_the_summary_of_a_run_is_read_from_its_folder(run: Run, tmp_path: Path):
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(run("show", EXAMPLE, "run.name=mine")[1])
    line = '{"step": 9, "time_s": 50.0, "speed/step_s": 2.0, "speed/tokens_per_s": 1024.0, "speed/start_s": 8.0}'
    (folder / "metrics.jsonl").write_text(line + "\n")
    code, out, err = run("summary", "mine")
    assert (code, err) == (0, "")
    assert out.startswith("done: 9 of 550 steps\n")
    assert "\n  time               10.0 s in 1 start\n" in out
    assert out.endswith("next:\n  to go on with the other 541 steps: the same command\n")
    assert run("summary", "yours")[0] == 2


def test_runs_are_listed_watched_and_compared(run: Run, tmp_path: Path):
    for name, loss in (("one", 3.0), ("two", 2.5)):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(run("show", EXAMPLE, f"run.name={name}", f"run.seed={loss:.0f}")[1])
        (folder / "metrics.jsonl").write_text(f'{{"step": 9, "train/loss_nats_per_token": {loss}}}\n')
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run("runs")
    assert (code, err) == (0, "")
    assert [line.split()[:4] for line in out.splitlines()[1:]] == [
        ["one", "failed", "9/550", "3.0000"],
        ["two", "failed", "9/550", "2.5000"],
    ]
    assert run("runs", "runs", "--json")[1].count('"state": "failed"') == 2
    assert run("runs", "elsewhere")[0] == 2
    code, out, err = run("watch", "two", "--once")
    assert (code, err, out.splitlines()[0]) == (0, "", "two   failed   phase main")
    assert run("watch", "three", "--once")[0] == 2
    code, out, err = run("compare", "one", "two")
    assert (code, err) == (0, "")
    assert [line.split() for line in out.splitlines() if line.startswith("run.seed")] == [["run.seed", "3", "2"]]
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"
    code, out, _ = run("compare", "one", "two", "--png", "c.png", "--html", "c.html")
    assert (code, out.splitlines()[-2:]) == (0, ["c.png", "c.html"])
    assert Path("c.png").stat().st_size > 10_000
    assert run("compare", "one", "two", "--png", "no/c.png")[0] == 2


def test_show_plan_is_a_table_and_writes_nothing(run: Run):
    code, out, _ = run("show", EXAMPLE, "--plan", "run.name=mine", "phases.continuation.optimizer_state=reset")
    *_, main, continuation = out.splitlines()
    assert code == 0
    assert main.split() == ["main", "1..500", "cosine", "25", "0.00012", "0.003", "0.0005", "0.1", "keep"]
    assert continuation.split() == [
        "continuation",
        "501..550",
        "linear",
        "0",
        *["0.0003"] * 2,
        "6e-06",
        "0.02",
        "reset",
    ]
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("words", "path"),
    [(["--plan", "--png", "run.name=mine"], "mine-plan.png"), (["--png", "pictures/lr.png"], "pictures/lr.png")],
)
def test_the_plan_is_drawn_where_it_is_asked_for(run: Run, words: list[str], path: str):
    code, out, err = run("show", EXAMPLE, *words)
    assert (code, err) == (0, "")
    assert out.splitlines()[-2].split()[0] == "continuation"
    assert out.splitlines()[-1] == path
    assert Path(path).read_bytes().startswith(b"\x89PNG")
    assert [str(file) for file in Path().rglob("*") if file.is_file()] == [path]


def test_a_picture_that_cannot_be_written_is_one_line(run: Run):
    Path("taken").touch()
    code, _, err = run("show", EXAMPLE, "--png", "taken/plan.png")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("error: the picture cannot be written: saw taken/plan.png (")


# --- explain


def test_explain_fits_the_terminal(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "50")
    code, out, err = run("explain", "phases.main.lr")
    assert (code, err) == (0, "")
    assert out.startswith("phases.NAME.lr\n  meaning  peak learning rate")
    assert max(map(len, out.splitlines())) <= 50
    monkeypatch.setenv("COLUMNS", "400")
    assert 80 < max(map(len, run("explain", "tokenizer.name")[1].splitlines())) <= 100


# --- tune


def test_tune_gets_the_axes_as_they_were_typed(run: Run, monkeypatch: pytest.MonkeyPatch):
    from smoltrain.tune import tune

    calls: list[Any] = []
    monkeypatch.setattr(tune, "tune_recipe", lambda *words, **options: calls.append((words, options)) or 75)
    options = ["--lr", "1e-3,2e-3", "--steps", "60", "--seeds", "2", "--ranks", "1"]
    assert run("tune", EXAMPLE, "kind=adamw,muon", "--optimizer.eps", "1e-8,1e-7", *options)[0] == 75
    words = (EXAMPLE, ["kind=adamw,muon", "optimizer.eps=1e-8,1e-7"])
    assert calls == [(words, {"lr": "1e-3,2e-3", "steps": 60, "num_seeds": 2, "ranks": 1})]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "smoltrain tune needs a RECIPE: saw none"),
        ([EXAMPLE], "there is nothing to compare: saw no key with several values, want --lr V1,V2,..."),
        ([EXAMPLE, "--lr", "1e-3,"], "a value of --lr is empty: saw 1e-3,, want values between commas"),
        ([EXAMPLE, "--lr", "1e-3,2e-3", "--steps", "0"], "--steps is not valid: saw '0'"),
        ([EXAMPLE, "--lr", "1e-3,2e-3", "--seeds", "0"], "--seeds is not valid: saw '0'"),
        (["quikstart", "--lr", "1e-3,2e-3"], "no such recipe: saw 'quikstart', want 'quickstart'"),
        (
            [EXAMPLE, "run.name=a,b"],
            "run.name cannot be an axis: saw 2 values, want one value (it says where runs live",
        ),
    ],
)
def test_a_grid_that_cannot_be_is_one_line(run: Run, arguments: list[str], line: str):
    code, out, err = run("tune", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {line}")
    assert not list(Path().iterdir())


# --- train


def test_train_on_no_ranks_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    line = "error: this machine cannot run so many ranks: saw 0, want 1 or more; change --ranks\n"
    assert run("train", "quickstart", "--ranks", "0") == (2, "", line)
    assert not list(Path().iterdir())


@pytest.fixture
def supervised(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The calls of supervise; what it shall return, or raise, is put into `ends`."""
    from smoltrain.launch import supervisor

    calls = SimpleNamespace(seen=[], ends=0)

    def instead(*arguments: object) -> int:
        calls.seen.append(arguments)
        if isinstance(calls.ends, BaseException):
            raise calls.ends
        return calls.ends

    monkeypatch.setattr(supervisor, "supervise_run", instead)
    return calls


@pytest.mark.parametrize(
    ("arguments", "call"),
    [
        (["quickstart"], ("quickstart", [], None)),
        (["quickstart", "run.seed=1", "--ranks", "2", "run.name=x"], ("quickstart", ["run.seed=1", "run.name=x"], 2)),
        (["--ranks=1", "my.yaml", "data.path=-"], ("my.yaml", ["data.path=-"], 1)),
        ([], ("quickstart", [], None)),
        (["run.name=x", "--ranks", "2", "run.seed=1"], ("quickstart", ["run.name=x", "run.seed=1"], 2)),
    ],
)
def test_train_supervises(
    run: Run, supervised: SimpleNamespace, arguments: list[str], call: tuple[str, list[str], int | None]
):
    assert run("train", *arguments) == (0, "", "")
    assert [seen[:3] for seen in supervised.seen] == [call]


@pytest.mark.parametrize(
    ("typed", "overrides", "ranks"),
    [
        ("quickstart --lr 1e-3 --ranks 2", ["lr=1e-3"], 2),
        ("quickstart --phases.main.lr=1e-3 run.seed=1 --run.name second", None, None),
        ("--seed 7 --ranks=2 quickstart x=1", ["seed=7", "x=1"], 2),
        ("quickstart --keep-best --weight-decay 0.1", ["keep_best=true", "weight_decay=0.1"], None),
    ],
)
def test_options_that_are_keys_are_overrides(
    run: Run, supervised: SimpleNamespace, typed: str, overrides: list[str] | None, ranks: int | None
):
    assert run("train", *typed.split()) == (0, "", "")
    expected = overrides or ["phases.main.lr=1e-3", "run.seed=1", "run.name=second"]
    assert [seen[:3] for seen in supervised.seen] == [("quickstart", expected, ranks)]


def test_every_verb_that_takes_overrides_takes_them_as_options(run: Run):
    line = "lr is short for several keys: saw 'lr', want phases.main.lr=x (and phases.continuation.lr=x)"
    for verb in ("show", "estimate", "train", "prepare data"):
        code, out, err = run(*verb.split(), EXAMPLE, "--lr", "x")
        assert (code, out, err) == (2, "", f"error: {line}; change lr on the command line\n")


@pytest.mark.parametrize(
    ("words", "near"),
    [(("train", "q", "--rank", "2"), "--ranks"), (("show", "q", "--plans"), "--plan"), (("train", "q", "-x"), "-x")],
)
def test_an_option_that_is_nearly_one_of_the_verb_is_no_override(run: Run, words: tuple[str, ...], near: str):
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert near in err
    assert "unknown key" not in err


def test_an_option_of_the_verb_itself_comes_first(run: Run):
    """`--device` is a key too (engine.device)."""
    code, _, err = run("estimate", EXAMPLE, "--device", "abacus")
    assert code == 2
    assert "abacus" in err
    assert "engine.device" not in err


@pytest.mark.parametrize(
    ("ends", "code", "err"),
    [
        (75, 75, ""),
        (1, 1, ""),
        (UserError(Problem("a", "1", "2", "x")), 2, "error: a: saw 1, want 2; change x\n"),
        (TrainingStopped("the loss is nan"), 1, "error: the loss is nan\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_train_ends_as_the_run_does(
    run: Run, supervised: SimpleNamespace, ends: int | BaseException, code: int, err: str
):
    supervised.ends = ends
    assert run("train", "quickstart") == (code, "", err)


# --- generate


class Bytes:
    """A tokenizer whose ids are bytes; 0 separates, 255 is special too. Like real ones it decodes neither."""

    separator_id, num_ids = 0, 256
    special_ids = frozenset({0, 255})

    def unused_ids(self, vocab_size: int) -> list[int]:
        return list(range(256, vocab_size))

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i not in self.special_ids).decode(errors="replace")


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Every call behind `generate`; the text it writes is `says`."""
    from smoltrain.inference import load

    calls = SimpleNamespace(loaded=[], drawn=[], says="né 🙂".encode())
    settings = load_config(EXAMPLE, ["run.seed=7", "model.vocab_size=260", "tokenizer.vocab_size=257"])

    decoder = SimpleNamespace(section=settings.model, parameters=list, to=lambda _: None)

    def load_run(*arguments: object) -> load.LoadedModel:
        calls.loaded.append(arguments)
        stand_ins: tuple[Any, ...] = (decoder, None, Bytes(), settings.generation, settings.run.seed, Path())
        return load.LoadedModel(*stand_ins)

    def instead(*arguments: object, **options: object) -> Iterator[int]:
        calls.drawn.append((*arguments, options))
        return iter(calls.says)

    monkeypatch.setattr(load, "load_trained_model", load_run)
    monkeypatch.setattr(load, "generate_ids", instead)
    return calls


def test_generate_takes_the_settings_of_the_run(run: Run, generated: SimpleNamespace):
    assert run("generate", "quickstart", "--prompt", "Romeo, ") == (0, "Romeo, né 🙂\n", "")
    assert generated.loaded == [("quickstart", None)]
    ((model, ids, settings, options),) = generated.drawn
    assert (model.section.vocab_size, ids) == (260, list(b"Romeo, "))
    assert settings == load_config(EXAMPLE).generation
    assert options == {"stop_ids": [0], "banned_ids": [256, 257, 258, 259], "greedy": False, "seed": 7, "say": ANY}


def test_generate_passes_its_options_on(run: Run, generated: SimpleNamespace):
    line = "runs/x --temperature 0.5 --top-k 3 --top-p 0.9 --max-tokens 8 --greedy --seed 0 --checkpoint 500"
    assert run("generate", *line.split())[:2] == (0, "né 🙂\n")
    assert generated.loaded == [("runs/x", 500)]
    ((_, ids, settings, options),) = generated.drawn
    assert ids == [Bytes.separator_id], "an empty prompt begins a document"
    assert settings.model_dump() == {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "max_tokens": 8}
    assert (options["greedy"], options["seed"]) == (True, 0)


def test_generate_refuses_bad_settings(run: Run, generated: SimpleNamespace):
    code, out, err = run("generate", "quickstart", "--temperature", "-1", "--top-p", "2")
    assert (code, out, err.count("\n")) == (2, "", 2)
    assert err.startswith("error: generation.temperature is not valid: saw -1.0, want greater than or equal to 0")
    assert not generated.drawn


def test_generate_says_where_the_context_ended(run: Run, generated: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    from smoltrain.inference import load

    def instead(*arguments: object, say: Callable[[str], None], **options: object) -> Iterator[int]:
        yield from b"abc"
        say("the text stops")

    monkeypatch.setattr(load, "generate_ids", instead)
    assert run("generate", "x", "--temperature", "0") == (0, "abc\n", "the text stops\n")


def test_generate_says_where_it_computes_if_there_is_a_choice(
    run: Run, generated: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
):
    from smoltrain.inference import device

    assert run("generate", "x") == (0, "né 🙂\n", "")
    chosen = device.choose_inference_device(0, 2 * device.GIB)
    monkeypatch.setattr(device, "move_to_best_device", lambda _: chosen)
    assert run("generate", "x") == (0, "né 🙂\n", "computes on the GPU, which has room for the model\n")


def test_generate_without_a_run(run: Run):
    code, out, err = run("generate", "nowhere")
    assert (code, out) == (2, "")
    assert err.startswith("error: no such run: saw 'nowhere'")


def test_prepare_knows_two_tokenizers(run: Run):
    code, out, err = run("prepare", "tokenizer", "gpt3")
    assert (code, out) == (2, "")
    assert err == "error: no such tokenizer to prepare: saw 'gpt3', want 'gpt2' (the nearest valid one); change NAME\n"
