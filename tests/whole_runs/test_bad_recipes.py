"""Whatever a recipe, or a value on the command line, is: a Config or readable lines, and soon."""

import copy
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from smoltrain.config.load import config_to_yaml, load_config, read_run_config
from smoltrain.config.load_problems import collect_problems
from smoltrain.config.schema import MAX_INT, MAX_SEED, Config
from smoltrain.config.yaml_text import apply_override, read_yaml
from smoltrain.errors import Problem, UserError
from smoltrain.schedule import Plan
from tests.checkpoint.test_identity import schema_keys
from tests.config.test_load import EXAMPLE, EXAMPLE_TEXT, problems, written

# ---- values

VALUES = (
    "-1", "1000000000", "18446744073709551616", "9" * 5000, "1e308", "nan", "-inf", "", "[]", "{a: {b: [c]}}",
    '"\\0"', "../..", "a" * 300, '"\\ud800"', '"\\u2028\\e[2J"', "true",
)  # fmt: skip
KEYS = [key.replace("phases.*", "phases.main") for key in dict.fromkeys(schema_keys()) if "sources.*" not in key]


@pytest.fixture(scope="module")
def values() -> dict[str, object]:
    return read_yaml(Path(EXAMPLE))


@pytest.mark.parametrize("key", KEYS)
def test_each_value_of_each_key_is_a_config_or_readable_lines(values: dict[str, object], key: str) -> None:
    began = time.monotonic()
    for value in VALUES:
        mine = copy.deepcopy(values)
        wrong = apply_override(mine, f"{key}={value}")
        assert wrong is None
        try:
            settings = Config.model_validate(mine)
        except ValidationError as error:
            for line in map(str, collect_problems(error, mine, Path("x.yaml"), [f"{key}={value}"]).values()):
                assert line.isprintable(), "one line, that no terminal obeys"
                assert len(line) < 3000
                assert "Value error" not in line
        else:
            Path(str(settings.run_folder)).exists()
            config_to_yaml(settings)
    assert time.monotonic() - began < len(VALUES)


@pytest.mark.parametrize(("seed", "fits"), [(MAX_SEED, True), (MAX_SEED + 1, False), (2**64, False), (-1, False)])
def test_every_rank_can_use_the_seed(seed: int, fits: bool) -> None:
    import torch

    if not fits:
        assert problems(f"run.seed={seed}")[0].what == "run.seed is not valid"
        return
    with torch.random.fork_rng():
        torch.manual_seed(load_config(EXAMPLE, [f"run.seed={seed}"]).run.seed + 1 + 100_000)


@pytest.mark.parametrize(
    "words",
    [
        ["model.num_hidden_layers=1000000000"], ["track.print_every=99999999999"], ["spikes.history=9999999999999"],
        ["batch.accumulation=4000000000"], ["run.folder=\"a\\0b\""], [f"run.folder=/tmp/{'x' * 250}"],
        ["data.path=\"a\\0b\""], [f"run.name={'n' * 201}"], [f"run.name={'é' * 101}"], ["engine.hang_s=1e300"],
        ["phases.main.name=" + "p" * 201],
    ],
)  # fmt: skip
def test_what_no_machine_has_is_refused(words: list[str]) -> None:
    (found,) = problems(*words)
    assert found.what.endswith("is not valid")


@pytest.mark.parametrize(
    "inner", ["{num_hidden_layers: 1000000000}", "{n_layer: 100000}", "{hidden_size: 99999999999}", "{rope_theta: NaN}"]
)
def test_a_transformers_model_has_bounds_too(inner: str) -> None:
    model = "{kind: transformers, model_type: llama, vocab_size: 300, max_position_embeddings: 64, config: %s}"
    (found,) = problems(f"model={model % inner}")
    assert found.what == "model.config is not valid"


def test_a_plan_of_very_many_steps_is_shown_soon(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from smoltrain.cli.recipes import _build_plan_table
    from smoltrain.run.plots import draw_plan

    settings = load_config(EXAMPLE, [f"phases.main.steps={MAX_INT}"])
    began = time.monotonic()
    table = _build_plan_table(Plan(settings.phases))
    draw_plan(Plan(settings.phases), tmp_path / "plan.png")
    assert time.monotonic() - began < 10
    assert next(iter(table.columns[5].cells)) == "0.003"


def test_a_message_is_one_line_whatever_it_tells_of() -> None:
    line = str(Problem("a\nb", "\x1b[2J\u2028\r", "c" * 5000, "d\te"))
    assert line.isprintable()
    assert line.startswith(r"a\nb: saw \x1b[2J\u2028\r, want ccc")
    assert len(line) < 1200


# ---- files


def bomb() -> str:
    levels = "\n".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]" for n in range(30))
    return f"a0: &a0 [x]\n{levels}\n"


TEXTS: dict[str, bytes] = {
    "20,000 lists deep": b"a: " + b"[" * 20_000 + b"]" * 20_000,
    "20,000 mappings deep": b"a: " + b"{a: " * 20_000,
    "deep and unfinished": b"[" * 100_000,
    "an alias bomb": bomb().encode(),
    "an alias of itself": b"a: &a [*a]\n",
    "binary": bytes(range(256)) * 10,
    "zeros": bytes(1000),
    "a key that is a list": b"? [a]\n: b\n",
    "a key that is nothing": b"~: 3\n",
    "a key of a section that is nothing": EXAMPLE_TEXT.replace("track:", "track:\n  ~: 3").encode(),
    "a tag": b"a: !!python/object/apply:os.system [true]\n",
    "two documents": b"a: 1\n---\nb: 2\n",
    "half a UTF-16 character": b"\xff\xfea",
    "many keys": b"".join(b"k%d: 1\n" % n for n in range(1000)),
}


@pytest.fixture
def soon() -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < 20


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("content", TEXTS.values(), ids=TEXTS)
def test_a_file_that_is_no_recipe_is_readable_lines(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "mine.yaml").write_bytes(content)
    for read in (load_config, lambda name: read_run_config(Path(name))):
        with pytest.raises(UserError) as caught:
            read(str(tmp_path / "mine.yaml"))
        assert all(str(problem).isprintable() for problem in caught.value.problems)


def huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 100 << 20)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(
    ("make", "saw"),
    [
        (Path.mkdir, "a folder, pipe or device"),
        (os.mkfifo, "a folder, pipe or device"),
        (huge, "104,857,600 bytes"),
        (lambda path: path.symlink_to("nowhere"), "nowhere"),
    ],
    ids=["folder", "pipe", "100 MiB", "link to nothing"],
)
def test_a_path_that_is_no_recipe_is_one_line(tmp_path: Path, make: Callable[[Path], None], saw: str) -> None:
    path = tmp_path / "mine.yaml"
    make(path)
    with pytest.raises(UserError) as caught:
        load_config(str(path))
    (found,) = caught.value.problems
    assert str(path) in str(found)
    assert saw in str(found) or "missing" in found.what


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_recipe_as_any_editor_saves_it(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "mine.yaml").write_bytes(EXAMPLE_TEXT.replace("\n", "\r\n").encode(encoding))
    settings = load_config(str(tmp_path / "mine.yaml"))
    assert settings == load_config(written(tmp_path, EXAMPLE_TEXT, "mine.yaml"))


@pytest.mark.parametrize("name", ["a b", "é!", "x" * 201, ".hidden"])
def test_a_recipes_name_that_is_no_runs_name_is_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"run\.name is not valid"):
        load_config(written(tmp_path, EXAMPLE_TEXT, f"{name}.yaml"))
