"""The wheel and the sdist: what is built from the sources trains and exports where there is no checkout.

The new environment borrows the libraries of this one (torch and the rest, gigabytes) by a .pth file. smoltrain itself
it has from the wheel alone: the editable install of this environment is a .pth file too, and those of a borrowed
folder are not read.
"""

import json
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from smoltrain import __version__
from smoltrain.errors import BAD_INPUT
from tests import launches

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parent.parent
# What the build reads. build/ and *.egg-info of earlier builds stay out: setuptools would pack what lies in them.
SOURCES = ["pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE", "constraints.txt", "smoltrain"]
SMALL = [
    "model.hidden_size=32", "model.num_attention_heads=2", "model.num_key_value_heads=1", "model.intermediate_size=64",
    "tokenizer.vocab_size=400", "model.vocab_size=400", "data.pattern=plays/histories/*.md", "phases.main.steps=4",
    "phases.main.warmup_steps=1", "phases.continuation.steps=2", "sample.every=0", "evaluate.rows=4", "track.wandb=off",
]  # fmt: skip
WHERE = "import json, sys, smoltrain; print(json.dumps([smoltrain.__file__, sys.path]))"
BUILD_SDIST = "import sys, setuptools.build_meta; setuptools.build_meta.build_sdist(sys.argv[1])"


def run(words: list[object], folder: Path, code: int = 0) -> str:
    """Run a command in a folder, as a shell without this environment would; its output."""
    environment = {
        name: value
        for name, value in launches.environment().items()
        if name not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")
    }
    done = subprocess.run(
        [str(word) for word in words],
        check=False,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the build reads, without what earlier builds left."""
    folder = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(sources: Path) -> Path:
    run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", sources / "dist", "."], sources)
    (wheel,) = (sources / "dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs' folder of an environment whose smoltrain is the wheel."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    run([*pip, "--ignore-installed", wheel], folder)
    return folder / "bin"


@pytest.fixture(scope="module")
def foreign(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is not the checkout's, in which quickstart has been trained, small."""
    folder = tmp_path_factory.mktemp("foreign")
    words = [*SMALL, "engine.ds_config=ds_configs/zero1.json"]
    said = run([environment / "smoltrain", "train", "quickstart", *words], folder)
    assert "done: 6 of 6 steps" in said
    assert "DeepSpeed ZeRO-1, from ds_configs/zero1.json" in said
    return folder


def test_smoltrain_is_the_wheels(environment: Path, foreign: Path):
    imported, path = json.loads(run([environment / "python", "-c", WHERE], foreign))
    assert Path(imported).parent.parent == next(environment.parent.glob("lib/*/site-packages"))
    own = str(environment.parent)
    others = [entry for entry in path if not entry.startswith(own)]
    assert [entry for entry in others if (foreign / entry / "smoltrain").exists()] == []
    assert str(ROOT) not in path


def test_both_ways_to_call_it_tell_the_version(environment: Path, foreign: Path):
    for words in ([environment / "smoltrain"], [environment / "python", "-m", "smoltrain"]):
        assert __version__ in run([*words, "--version"], foreign)


def test_a_run_trained_from_it_is_shown_checked_continued_and_exported(environment: Path, foreign: Path):
    smoltrain = environment / "smoltrain"
    assert "ds_config: ds_configs/zero1.json" in run([smoltrain, "show", "runs/quickstart/config.yaml"], foreign)
    assert "smollm2-135m" in run([smoltrain, "recipes"], foreign)
    assert run([smoltrain, "generate", "quickstart", "--prompt", "To be", "--max-tokens", 5], foreign).startswith(
        "To be"
    )
    run([smoltrain, "verify", "quickstart"], foreign)
    run([smoltrain, "export", "quickstart", "exported"], foreign)
    assert (foreign / "exported" / "config.json").is_file()
    assert (foreign / "runs" / "quickstart" / "config.yaml").read_text(encoding="utf-8").count("git_commit: unknown")


def test_a_shape_of_our_own_takes_its_class_along(environment: Path, foreign: Path):
    """The one export that needs a file of the package besides its modules' code."""
    words = [*SMALL, "run.name=own", "model.positions=learned", "phases.main.steps=1", "phases.main.warmup_steps=0"]
    words.append("run.stop_after=main")
    run([environment / "smoltrain", "train", "quickstart", *words, "--ranks", 1], foreign)
    run([environment / "smoltrain", "export", "own", "own"], foreign)
    assert (foreign / "own" / "modeling_smoltrain.py").is_file()


def test_other_launchers_start_the_rank_by_its_module(environment: Path, foreign: Path):
    words = ["-m", "smoltrain.launch.rank", "quickstart", *SMALL, "engine.ds_config=ds_configs/zero1.json"]
    assert "the plan is complete (6 steps)" in run([environment / "python", *words], foreign)


def test_a_corpus_that_is_not_installed_is_one_readable_error(environment: Path, foreign: Path):
    words = ["run.name=none", "data.package=no_such_corpus"]
    said = run([environment / "smoltrain", "train", "quickstart", *words], foreign, BAD_INPUT)
    assert "the data's package is not installed" in said
    assert "`pip install no_such_corpus`" in said
    assert "Traceback" not in said


def test_the_wheel_has_what_is_read_while_running_and_no_more(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "smoltrain"
    wanted = {str(p.relative_to(ROOT)) for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert {name for name in names if ".dist-info/" not in name} == wanted
    assert {"smoltrain/py.typed", "smoltrain/ds_configs/zero2.json", "smoltrain/recipes/quickstart.yaml"} <= wanted


def test_a_wheel_made_from_the_sdist_is_the_same(sources: Path, wheel: Path, tmp_path: Path):
    run([sys.executable, "-c", BUILD_SDIST, tmp_path], sources)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, "."], unpacked)
    (again,) = tmp_path.glob("*.whl")
    ours, theirs = (zipfile.ZipFile(path) for path in (wheel, again))
    assert sorted(ours.namelist()) == sorted(theirs.namelist())
    for member in ours.namelist():
        assert ours.read(member) == theirs.read(member), member
