"""The verb: a recipe that loads, checks and says the truth of itself, for each size; mistakes in one line."""

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from smoltrain.cli import main
from smoltrain.config.load import load_config
from smoltrain.config.schema import Config, DataSection
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.model.build import build_model, count_parameters
from smoltrain.new_recipe import write
from smoltrain.new_recipe.plan import StudiedText
from smoltrain.new_recipe.wish import RecipeWish
from smoltrain.training.preflight import check_recipe
from tests import launches
from tests.faulty_server import FaultyServer
from tests.hub import Hub, Repo
from tests.new_recipe.texts import study_large_text, write_texts

Run = Callable[..., tuple[int | str | None, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """run("tiny", ...) is (exit code, stdout, stderr) of `smoltrain new` in a folder of its own, for an H100."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str, device: str = "h100") -> tuple[int | str | None, str, str]:
        with pytest.raises(SystemExit) as left:
            main(["new", *words, "--device", device])
        told = capsys.readouterr()
        return left.value.code, told.out, told.err

    return run


@pytest.fixture
def texts(tmp_path: Path) -> str:
    return str(write_texts(tmp_path / "texts"))


def load_checked(name: str) -> Config:
    config = load_config(f"{name}.yaml")
    check_recipe(config)
    return config


@pytest.mark.parametrize(
    ("params", "number"), [("2M", 2e6), ("20M", 2e7), ("135M", 1.35e8), ("360M", 3.6e8), ("1B", 1e9)]
)
def test_a_recipe_of_each_size(run: Run, monkeypatch: pytest.MonkeyPatch, params: str, number: float):
    monkeypatch.setattr(write, "study_text", study_large_text)
    code, out, err = run("tiny", "--params", params, "--data", "texts", "--world", "8")
    assert (code, err) == (0, "")
    config = load_checked("tiny")
    parameters = count_parameters(build_model(config.model, device="meta"))
    assert abs(parameters / number - 1) <= 0.03
    text = Path("tiny.yaml").read_text()
    assert f"# Parameters:     {parameters:,} exactly" in text
    assert f"  parameters   {parameters:,} ({params} asked for)" in out
    tokens = config.phases[0].num_steps * config.batch.rows(8) * config.batch.sequence_length
    assert tokens == pytest.approx(20 * parameters, rel=0.01), "compute-optimal"
    assert f"= {tokens:,} tokens: 20 a parameter" in text
    assert re.search(
        r"  8 x h100     \S+ (seconds|minutes|hours|days), [\d.]+ of 74.5 GiB a rank \(both estimated\)", out
    )
    assert all(len(line) <= 80 for line in out.splitlines())
    assert config.batch.micro_batch == "auto"
    assert config.batch.rows_per_step is not None
    assert config.batch.rows_per_step % 8 == 0


def test_a_text_of_ones_own(run: Run, texts: str):
    code, out, _ = run("tiny", "--params", "2M", "--data", "texts")
    assert code == 0
    config = load_checked("tiny")
    assert config.data.path == texts, "from the root, so that any folder will do"
    assert config.model.vocab_size == config.tokenizer.vocab_size == 257
    assert "note: the text ends the plan after 4 epochs; compute-optimal are 20 tokens a parameter" in out
    assert "less than a token a parameter" in out
    first = Path("tiny.yaml").read_text()
    assert run("again", "--params", "2M", "--data", "texts")[0] == 0
    assert Path("again.yaml").read_text().replace("again", "tiny") == first, "the same input, the same text"


def test_an_explicit_length_is_kept_and_what_it_means_is_said(run: Run, texts: str):
    assert texts
    _, out, _ = run("long", "--params", "2M", "--data", "texts", "--tokens", "1M")
    config = load_checked("long")
    assert config.phases[0].num_steps * config.batch.rows(1) * config.batch.sequence_length == pytest.approx(
        1e6, rel=0.01
    )
    assert "note: a text read more than 4 times teaches less and less" in out
    assert "  tokens       999K = 0.495 a parameter, 18 epochs" in out


def test_stories_in_one_file_are_parted(run: Run, texts: str):
    stories = [path.read_text() for path in sorted(Path(texts).iterdir())]
    Path("stories.txt").write_text("<|endoftext|>\n".join(stories))
    code, out, _ = run("tiny", "--params", "2M", "--data", "stories.txt")
    assert code == 0
    assert load_checked("tiny").data.documents == "separator"
    assert "note: '<|endoftext|>' stands in the files, so it parts documents (data.documents: separator)" in out


def test_a_small_text_behind_a_url_is_cached_as_it_would_be_too_few_documents_to_be_streamed(run: Run, texts: str):
    text = b"".join(path.read_bytes() for path in sorted(Path(texts).iterdir()))
    with FaultyServer({"input.txt": text}) as server:
        code, out, _ = run("tiny", "--params", "2M", "--data", server.url("input.txt"))
        config = load_checked("tiny")
        prepared = prepare_run_data(config, config.batch.rows_per_step)
    assert code == 0
    assert "note: all tokens are made before the first step (data.mode: cached)" in out
    assert (config.data.mode, prepared.mode) == ("cached", "cached")


def test_hours_become_tokens_by_the_estimated_speed(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(write, "study_text", study_large_text)
    told = {}
    for hours in ("1", "2"):
        _, told[hours], _ = run(f"h{hours}", "--params", "135M", "--data", "texts", "--hours", hours)
    steps = [load_checked(f"h{hours}").phases[0] for hours in ("1", "2")]
    assert steps[1].num_steps > steps[0].num_steps
    assert "  1 x h100     56 minutes," in told["1"], "and some for starting, evaluating, sampling and saving"
    assert "  1 x h100     1.9 hours," in told["2"]
    assert "what 1 x h100 is estimated to do in 2 hours, as asked for with" in Path("h2.yaml").read_text()


def test_what_does_not_fit_is_said(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(write, "study_text", study_large_text)
    _, out, _ = run("large", "--params", "7B", "--data", "texts", device="l4")
    assert "note: it is not estimated to fit 1 x l4" in out


# --- mistakes


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("tiny", "--params", "20X"), "--params is not valid: saw '20X', want 1M to 20B, as in 1M or 1_000_000"),
        (("tiny", "--params", "0"), "--params is not valid: saw '0'"),
        (("tiny", "--params", "10T"), "--params is not valid: saw '10T'"),
        (("tiny", "--params", "2M", "--tokens", "some"), "--tokens is not valid: saw 'some'"),
        (("tiny", "--params", "2M", "--tokens", "1M", "--hours", "2"), "the plan's length is given twice"),
        (("tiny", "--params", "2M", "--hours", "0"), "--hours is not valid: saw 0, want more than 0"),
        (("tiny", "--params", "2M", "--hours", "nan"), "--hours is not valid: saw nan"),
        (("tiny", "--params", "2M", "--world", "0"), "--world is not valid: saw 0, want 1 to"),
        (("a/tiny", "--params", "2M"), "the recipe's name is not valid: saw 'a/tiny'"),
        (("tiny.yaml", "--params", "2M"), "the recipe's name is not valid: saw 'tiny.yaml'"),
        (("", "--params", "2M"), "the recipe's name is not valid: saw ''"),
        (("quickstart", "--params", "2M"), "a shipped recipe has this name, and its run folder"),
        (("there", "--params", "2M"), "the file exists: saw there.yaml, want a name without a file; change NAME"),
        (("tiny", "--params", "2M", "--data", "nowhere"), "the data are missing: saw "),
        (("tiny", "--params", "2M", "--data", "~nosuchuser/texts"), "the data are missing: saw "),
        (("tiny", "--params", "2M", "--data", ""), "--data is empty"),
        (("tiny", "--params", "2M", "--data", "https://a.b/c.txt?sig=SECRET"), "would hold the secret of a URL"),
        (("tiny", "--params", "2M", "--data", "empty"), "no file matches"),
        (("tiny", "--params", "2M", "--hub", "me/" + 300 * "a"), "data.hub is not valid: saw"),
        (("tiny", "--params", "2M", "--data", "texts", "--hub", "me/it"), "the text is given twice: saw --data texts"),
        (("tiny", "--params", "2M", "--hub", ""), "--hub is empty: saw '', want OWNER/NAME of a dataset; change --hub"),
        (
            ("tiny", "--params", "2M", "--data", "texts", "--hub-config", "en"),
            "--hub-config is about a dataset that is not",
        ),
        (("tiny", "--params", "2M", "--text-field", "body"), "want --data PATH or --hub OWNER/NAME beside it"),
        (("tiny", "--params", "2M", "--validation", "texts"), "--validation is about a text that is not named"),
        (("tiny", "--params", "2M", "--data", "texts", "--validation", "nowhere"), "change --validation"),
        (
            ("tiny", "--params", "2M", "--data", "texts", "--validation", "https://a.b/c.txt?sig=SECRET"),
            "; change --validation; and data.validation_path=URL when it is trained",
        ),
        (("tiny", "--params", "2M", "--data", "texts", "--world", "4096"), "the text is too short to train on"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(run: Run, texts: str, words: tuple[str, ...], says: str):
    assert texts
    Path("there.yaml").write_text("mine")
    Path("empty").mkdir()
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert says in err
    assert err.count("\n") == 1
    assert "SECRET" not in err
    assert [path.name for path in Path().glob("*.yaml")] == ["there.yaml"]
    assert Path("there.yaml").read_text() == "mine"


def test_a_file_that_appears_meanwhile_is_not_overwritten(run: Run, monkeypatch: pytest.MonkeyPatch):
    def study_slowly(wish: RecipeWish) -> StudiedText:
        Path("tiny.yaml").write_text("mine")
        return study_large_text(wish)

    monkeypatch.setattr(write, "study_text", study_slowly)
    code, _, err = run("tiny", "--params", "2M", "--data", "texts")
    assert code == 2
    assert "the recipe cannot be written: saw" in err
    assert Path("tiny.yaml").read_text() == "mine"


def test_a_device_that_there_is_not(run: Run):
    code, _, err = run("tiny", "--params", "2M", device="h1000")
    assert code == 2
    assert "no such device: saw 'h1000', want 'h100' (the nearest valid one); change --device" in err


# --- from the Hub


@pytest.mark.slow  # the clients of the Hub read its address when they are imported, so in a process of their own
def test_a_dataset_of_the_hub(tmp_path: Path):
    stories = [f"Story {i} is about the number {i * i}, and nobody knows why. " * (i % 7 + 3) for i in range(2000)]
    files = {"train-0.jsonl": to_jsonl(stories), "validation.jsonl": to_jsonl(stories[:50])}
    with Hub([Repo("me/stories", files, kind="datasets")]) as hub:
        own = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment = own | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache")}
        words = ["new", "tiny", "--params", "2M", "--hub", "me/stories", "--text-field", "story", "--device", "h100"]

        def run(*more: str) -> subprocess.CompletedProcess[str]:
            command = [str(launches.BIN / "smoltrain"), *words, *more]
            return subprocess.run(
                command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
            )

        refused = run("--validation", "valid")
        done = run("--validation", "validation")
    assert refused.returncode == 2
    assert refused.stderr == (
        "error: the dataset me/stories has no such split: saw 'valid', want 'validation' (the nearest valid one); "
        "change --validation\n"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^  text +\S+ tokens, and \S+ held out$", done.stdout, re.MULTILINE), "they are not of the text"
    data = load_config(str(tmp_path / "tiny.yaml")).data
    assert data == DataSection(hub="me/stories", text_field="story", validation_split="validation", mode="cached")
    assert "tokens of the Hub's me/stories" in (tmp_path / "tiny.yaml").read_text()


def to_jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"story": text}) + "\n" for text in texts).encode()


# --- trained as written


@pytest.mark.slow
@pytest.mark.parametrize(
    ("params", "tokens", "overrides"), [("2M", "12K", []), ("20M", "40K", ["phases.main.steps=6"])]
)
def test_a_new_recipe_trains_as_written(
    run: Run, texts: str, tmp_path: Path, params: str, tokens: str, overrides: list[str]
):
    assert run("tiny", "--params", params, "--data", texts, "--tokens", tokens, "--world", "2")[0] == 0
    overrides += ["phases.main.warmup_steps=2"] if overrides else []
    words = [str(tmp_path / "tiny.yaml"), *overrides, f"run.folder={tmp_path / 'runs'}", "--ranks", "2"]
    log = tmp_path / "log"
    try:
        with log.open("wb") as out:
            command = [str(launches.BIN / "smoltrain"), "train", *words]
            done = subprocess.run(
                command, stdout=out, stderr=out, env=launches.environment(), timeout=launches.TIMEOUT_S, check=False
            )
    finally:
        launches.kill_all(words)
    assert done.returncode == 0, log.read_text()
    lines = launches.metrics(tmp_path / "runs" / "tiny")
    config = load_config("tiny.yaml", overrides)
    assert lines[-1]["step"] == config.phases[0].num_steps
    losses = [line["train/loss_nats_per_token"] for line in lines if "train/loss_nats_per_token" in line]
    assert losses[-1] < losses[0]
    warnings = [line for line in log.read_text().splitlines() if "WARNING" in line]
    of_busy_machine = ("communication", "more rows per step")  # which a narrow screen has on two lines
    others = [line for line in warnings if not any(words in line for words in of_busy_machine)]
    assert not others, "a busy machine alone is warned of"
