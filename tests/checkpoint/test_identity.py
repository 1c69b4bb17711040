"""A run stays the run that it is: a table says what may differ; checkpoints and config.yaml hold it to that."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from smoltrain.checkpoint.identity import (
    FREE,
    KEY_RULE_TABLE,
    KEY_RULES,
    check_checkpoint_identity,
    find_forbidden_changes,
    find_identity_mismatches,
    is_announced,
    key_rule,
    make_run_identity,
)
from smoltrain.checkpoint.manifest import (
    LAST_SAVED_FILE,
    MANIFEST_FILE,
    Manifest,
    read_manifest,
    step_folder,
    write_last_saved_step,
)
from smoltrain.config.config_file import CONFIG_FILE, find_config_damage, read_provenance
from smoltrain.config.load import read_run_config
from smoltrain.config.schema import MODEL_SECTIONS, Config, MixedSource, PhaseSection, Section
from smoltrain.errors import UserError
from smoltrain.inference.load import load_trained_model
from smoltrain.run import run_folder
from smoltrain.run.inspect_checkpoint import inspect_checkpoint, open_run_reference
from smoltrain.run.verify import _find_lost_checkpoints
from smoltrain.training.start_point import StartPoint, find_start_point
from tests import folders, tiny

# ---- the table


def schema_keys(section: type[Section] = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the schema, `*` for the name of a source or phase."""
    for name, field in section.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        inner = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        found = [kind for kind in inner if issubclass(kind, Section)]
        if key == "model":
            for kind in MODEL_SECTIONS.values():
                yield from schema_keys(kind, "model.")
        elif found:
            yield from schema_keys(found[0], f"{key}.*." if found[0] in (MixedSource, PhaseSection) else f"{key}.")
        else:
            yield key


def test_the_table_has_every_key_of_the_schema_and_each_once() -> None:
    listed = [f"{section}.{key}" for section, _, keys in KEY_RULE_TABLE for key in keys.split()]
    assert sorted(listed) == sorted(set(schema_keys()))


def test_each_key_has_the_rule_of_its_row() -> None:
    for row, rule in KEY_RULES.items():
        key = row.replace("*", "some-name")
        assert (key, key_rule(key)) == (key, rule)
        assert is_announced(key) == (rule != FREE), key


MIX = "data.sources=[{name: a, path: a.txt, weight: 1}, {name: b, path: b.txt, weight: 1}]"


@pytest.mark.parametrize(
    ("was", "now", "key"),
    [
        ("{name: a, path: a.txt, weight: 1}", "{name: a, path: x.txt, weight: 1}", None),
        ("{name: a, path: a.txt, weight: 1}", "{name: a, path: a.txt, weight: 2}", "data.sources.a.weight"),
        ("{name: a, path: a.txt, weight: 1}", "{name: c, path: a.txt, weight: 1}", "data.sources"),
    ],
)
def test_sources_are_compared_by_name_wherever_they_lie(tmp_path: Path, was: str, now: str, key: str | None) -> None:
    both = ("data.path=null", "data.package=null")
    old, new = (
        tiny.load(tmp_path, *both, f"data.sources=[{source}, {{name: b, path: b.txt, weight: 1}}]")
        for source in (was, now)
    )
    found = [change.key for change in find_forbidden_changes(make_run_identity(old, 4, "id"), new, 3)]
    assert (not found) if key is None else (key in found)


# ---- the rows of a step, in either way to say them

OUTRIGHT = ("batch.accumulation=null", "batch.rows_per_step=8")  # of runs that began with 2 x 2 on two ranks


@pytest.mark.parametrize(
    ("began", "goes_on", "world", "keys"),
    [
        ((), OUTRIGHT, 1, []),
        ((), OUTRIGHT, 4, []),
        ((), ("batch.accumulation=null", "batch.rows_per_step=4"), 2, ["batch.accumulation", "batch.rows_per_step"]),
        ((), (), 1, []),  # the same words on another world
        ((), ("batch.accumulation=4",), 1, []),  # 2 x 4 x 1
        ((), ("batch.accumulation=4",), 2, ["batch.accumulation"]),
        ((), ("batch.accumulation=1", "batch.micro_batch=4"), 2, []),
        (OUTRIGHT, (), 2, []),
        (OUTRIGHT, (), 1, ["batch.accumulation", "batch.rows_per_step"]),
        (OUTRIGHT, ("batch.accumulation=null", "batch.rows_per_step=16"), 2, ["batch.rows_per_step"]),
    ],
)
def test_a_run_is_held_to_its_rows_however_the_recipe_says_them(
    tmp_path: Path, began: tuple[str, ...], goes_on: tuple[str, ...], world: int, keys: list[str]
) -> None:
    own = make_run_identity(tiny.load(tmp_path, *began), 8, "id")
    changes = find_forbidden_changes(own, tiny.load(tmp_path, *goes_on), 3, world)
    assert [change.key for change in changes] == keys


def test_a_run_of_an_older_recipe_goes_on_under_one_that_says_its_rows_outright(tmp_path: Path) -> None:
    """What an older version wrote: `accumulation` in config.yaml and in the manifests, and no word of tokens."""
    run = folders.run(tmp_path, states=True)
    config_file = run / CONFIG_FILE
    text = config_file.read_text(encoding="utf-8").partition("# sha256")[0]
    config_file.write_text(text.replace("  tokens: null\n  epochs: null\n", ""), encoding="utf-8")
    for step in (8, 12):
        manifest = read_manifest(step_folder(run / "checkpoints", step))
        assert isinstance(manifest, Manifest)
        assert manifest.identity["values"]["batch.accumulation"] == 2
        assert "tokens" not in manifest.identity["phases"][0]
    new = tiny.load(tmp_path, "batch.accumulation=null", "batch.rows_per_step=4")
    point = find_start_point(new, print)
    for _ in range(2):  # the second time config.yaml says it outright, and the checkpoint as it did
        assert tiny.enter_run_folder(new, 2, point.step, manifest=point.manifest).rows_per_step == 4
        assert read_run_config(config_file).batch.rows_per_step == 4
    other = tiny.load(tmp_path, "batch.accumulation=null", "batch.rows_per_step=8")
    with pytest.raises(UserError, match=r"batch\.rows_per_step: 4 in the run, 8 asked"):
        tiny.enter_run_folder(other, 2, point.step, manifest=point.manifest)
    config_file.unlink()  # then the checkpoint alone tells
    assert tiny.enter_run_folder(new, 1, point.step, manifest=point.manifest).rows_per_step == 4


@pytest.mark.parametrize("lost", [False, True], ids=["config.yaml", "manifest alone"])
def test_a_run_of_a_version_with_other_names_of_keys_goes_on(tmp_path: Path, lost: bool) -> None:
    """config.yaml and manifests say `optimizer.name`, and nothing of muon's keys."""
    run = folders.run(tmp_path, states=True)
    folders.make_older(run)
    text = (run / CONFIG_FILE).read_text(encoding="utf-8")
    values = json.loads((step_folder(run / "checkpoints", 12) / MANIFEST_FILE).read_text())["identity"]["values"]
    assert ("optimizer:\n  name: adamw\n  beta1" in text, values["optimizer.name"]) == (True, "adamw")
    assert not any(key.startswith(("optimizer.kind", "optimizer.momentum")) for key in values)
    _, faults = inspect_checkpoint(open_run_reference(run, needs_data=False), run / "checkpoints/step-00000012")
    assert [fault for fault in faults if "agree" in fault] == []
    assert load_trained_model(str(run)).step == 12
    settings = tiny.load(tmp_path)
    if lost:
        (run / CONFIG_FILE).unlink()
    with pytest.raises(UserError, match=r"run's own: saw optimizer\.kind: adamw in the run, muon asked; "):
        begun(tiny.load(tmp_path, "optimizer=muon"))
    for _ in range(2):  # the second time config.yaml has the name of today, and the checkpoint as it was
        entered = begun(settings)
        assert [change for change in entered.changes if "was gone" not in change] == []
        assert find_config_damage(run) is None
        assert read_run_config(run / CONFIG_FILE).optimizer.kind == "adamw"
    assert "kind: adamw" in (run / CONFIG_FILE).read_text(encoding="utf-8")
    assert load_trained_model(str(run)).step == 12


def test_an_identity_survives_json_and_names_no_path(tmp_path: Path) -> None:
    secret = ("data.path=https://user:word@host/x?token=abc", "data.validation_path=https://host/v?token=abc")
    settings = tiny.load(tmp_path, *secret, "phases.continuation.mix=null")
    own = make_run_identity(settings, 4, "id")
    again = json.loads(json.dumps(own))
    assert again == own
    assert find_forbidden_changes(again, settings, 12) == []
    assert find_identity_mismatches(again, own, 12) == []
    assert "token" not in json.dumps(own).replace("tokenizer", "")
    assert str(tmp_path) not in json.dumps(own)


# ---- what is printed


def test_what_differs_and_is_accepted_is_said_and_recorded(tmp_path: Path) -> None:
    tiny.enter_run_folder(tiny.load(tmp_path), 1, 0)
    words = ("engine.precision=fp32", "evaluate.rows=4", "track.print_every=3", "phases.continuation.lr=1e-5")
    entered = tiny.enter_run_folder(tiny.load(tmp_path, *words, "run.stop_after=main"), 1, 3)
    said = {"engine.precision: 'bf16' -> 'fp32'", "evaluate.rows: 8 -> 4", "phases.continuation.lr: 0.0003 -> 1e-05"}
    assert set(entered.changes) == said
    provenance = read_provenance(entered.path / CONFIG_FILE)
    free = {"run.stop_after: None -> 'main'", "track.print_every: 2 -> 3"}
    assert set(provenance["starts"][1]["changes"]) == said | free
    assert tiny.enter_run_folder(tiny.load(tmp_path, *words), 1, 3).changes == ()


def test_provenance_keeps_the_first_start_and_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "MAX_STARTS", 4)
    for done in range(7):
        tiny.enter_run_folder(tiny.load(tmp_path), 1, done)
    starts = read_provenance(tiny.load(tmp_path).run_folder / CONFIG_FILE)["starts"]
    assert [start["from_step"] for start in starts] == [0, 4, 5, 6]


# ---- config.yaml against the checkpoint


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 8 and 12."""
    folder = tmp_path_factory.mktemp("original")
    folders.run(folder, states=True)
    return folder


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(original / "runs", tmp_path / "runs")
    return tmp_path / "runs" / "quickstart"


def command(run: Path, original: Path, *overrides: str) -> Config:
    """The config of the command that trains the copy."""
    return tiny.load(original, f"run.folder={run.parent}", *overrides)


def begun(settings: Config) -> run_folder.RunFolder:
    found = find_start_point(settings, print)
    return tiny.enter_run_folder(settings, 1, found.step, found.ancestor, found.manifest)


def replaced(run: Path, old: str, new: str) -> None:
    path = run / CONFIG_FILE
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize(
    ("old", "new", "seen"),
    [
        ("rope_theta: 10000.0", "rope_theta: 18000.0", "model.rope_theta is 18000.0, not 10000.0"),
        ("beta2: 0.95", "beta2: 0.97", "optimizer.beta2 is 0.97, not 0.95"),
        ("seed: 1234", "seed: 1235", "run.seed is 1235, not 1234"),
        ("  rows_per_step: 4", "  rows_per_step: 5", "rows_per_step is 5, not 4"),
        ("lr: 0.003", "lr: 0.001", "step 1 is phase main, lr 0.0005, weight decay 0.1, not phase main, lr 0.0015"),
    ],
)
def test_a_config_that_its_checkpoint_denies_is_refused_everywhere(
    run: Path, original: Path, old: str, new: str, seen: str
) -> None:
    replaced(run, old, new)
    before = (run / CONFIG_FILE).read_bytes()
    for action in (lambda: begun(command(run, original)), lambda: load_trained_model(str(run))):
        with pytest.raises(UserError, match=r"config\.yaml does not agree with the checkpoint of step 12") as caught:
            action()
        assert seen in str(caught.value)
    reference = open_run_reference(run, needs_data=False)
    _, faults = inspect_checkpoint(reference, step_folder(run / "checkpoints", 12))
    assert any(seen in fault for fault in faults)
    assert (run / CONFIG_FILE).read_bytes() == before


def test_any_flip_of_config_yaml_is_said(run: Path, original: Path) -> None:
    """The command's own values count, so a config.yaml that is damaged where nothing depends on it is mended."""
    assert find_config_damage(run) is None
    replaced(run, "print_every: 2", "print_every: 6")
    assert (find_config_damage(run) or "").startswith(f"{run / CONFIG_FILE} is not what the run wrote")
    assert begun(command(run, original)).changes[0].startswith(f"{run / CONFIG_FILE} is not what the run wrote")
    assert find_config_damage(run) is None
    assert read_run_config(run / CONFIG_FILE).track.print_every == 2


def test_a_lost_config_is_written_anew_and_the_run_stays_itself(run: Path, original: Path) -> None:
    provenance = read_provenance(run / CONFIG_FILE)
    (run / CONFIG_FILE).unlink()
    entered = begun(command(run, original))
    after = read_provenance(run / CONFIG_FILE)
    assert [after[key] for key in ("run_id", "wandb_id", "rows_per_step")] == [
        provenance[key] for key in ("run_id", "wandb_id", "rows_per_step")
    ]
    assert "was gone" in entered.changes[0]
    assert after["starts"][0]["lost"]


@pytest.mark.parametrize(
    "words",
    ["batch.accumulation=4", "run.seed=999", "optimizer.beta2=0.99", "phases.main.lr=1e-3", "model.norm=layernorm"],
)
def test_a_lost_config_lets_no_other_run_in(run: Path, original: Path, words: str) -> None:
    (run / CONFIG_FILE).unlink()
    with pytest.raises(UserError, match=r"the config differs from the run's own: saw \S+: \S+ in the run, \S+ asked"):
        begun(command(run, original, words))
    assert not (run / CONFIG_FILE).exists(), "a refused start writes nothing"


def test_another_runs_checkpoint_is_refused(run: Path, original: Path, tmp_path: Path) -> None:
    other = folders.run(tmp_path / "other", states=True)
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    shutil.copytree(other / "checkpoints" / "step-00000012", run / "checkpoints" / "step-00000012")
    for action in (lambda: begun(command(run, original)), lambda: load_trained_model(str(run))):
        with pytest.raises(UserError, match="the checkpoint of step 12 is another run's"):
            action()


def test_the_manifest_of_an_older_format_is_named(run: Path) -> None:
    path = run / "checkpoints" / "step-00000012" / MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    assert read_manifest(path.parent) == f"{path} has format 2, not 3 or 4"


# ---- checkpoints that are gone


def gone(settings: Config) -> str:
    """The refusal, which is one line."""
    with pytest.raises(UserError, match="the checkpoints of this run are gone") as caught:
        find_start_point(settings, print)
    assert len(caught.value.problems) == 1
    return str(caught.value)


def note(run: Path) -> None:
    write_last_saved_step(run / "checkpoints", 12)


@pytest.mark.parametrize("left", ["nothing", "an empty folder", "what is no checkpoint"])
def test_a_run_whose_checkpoints_are_gone_does_not_begin_from_scratch(run: Path, original: Path, left: str) -> None:
    note(run)
    shutil.rmtree(run / "checkpoints")
    if left != "nothing":
        (run / "checkpoints").mkdir()
    if left == "what is no checkpoint":
        (run / "checkpoints" / "step-00000012.tmp").mkdir()
        (run / "checkpoints" / "step-²").mkdir()
    said = gone(command(run, original))
    assert f"{run / LAST_SAVED_FILE} tells of step 12" in said
    assert f"without {run} the run begins from scratch" in said
    assert _find_lost_checkpoints(run, []) == f"{run / 'checkpoints'} is empty, but the run has saved step 12"


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"step": "x"}', b'{"step": -1}', bytes(9)])
def test_a_damaged_note_still_tells_that_there_was_a_checkpoint(run: Path, original: Path, damage: bytes) -> None:
    (run / LAST_SAVED_FILE).write_bytes(damage)
    shutil.rmtree(run / "checkpoints")
    gone(command(run, original))


def test_a_link_to_a_disk_that_is_not_there_is_refused(run: Path, original: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").symlink_to(tmp_path / "unmounted")
    with pytest.raises(UserError, match="the checkpoints cannot be looked at"):
        find_start_point(command(run, original), print)


def pauses(run: Path, *steps: int) -> None:
    lines = [{"step": step, "speed/checkpoint_pause_s": 0.1} for step in steps]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_metrics_alone_and_config_alone_tell_of_checkpoints_too(run: Path, original: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    pauses(run, 3, 6)
    assert "metrics.jsonl tells that one of step 3 was written" in gone(command(run, original))
    pauses(run)
    tiny.enter_run_folder(command(run, original), 1, 6)
    assert "config.yaml tells of a start from step 6" in gone(command(run, original))


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again_and_says_so(run: Path, original: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    pauses(run, 3)  # begun, and not published
    said: list[str] = []
    assert find_start_point(command(run, original), said.append) == StartPoint()
    assert said == ["no checkpoint was saved before the run ended, so its 3 steps are done again"]


def test_going_back_on_purpose_is_said(run: Path, original: Path) -> None:
    note(run)
    said: list[str] = []
    assert find_start_point(command(run, original), said.append).step == 12
    assert said == []
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    assert find_start_point(command(run, original), said.append).step == 8
    (line,) = said
    assert line.startswith("goes on from step 8: its checkpoints of later steps, to 12, are gone")


def test_manifests_of_one_run_carry_its_identity(run: Path, original: Path) -> None:
    manifest = read_manifest(run / "checkpoints" / "step-00000008")
    assert isinstance(manifest, Manifest)
    provenance = read_provenance(run / CONFIG_FILE)
    assert manifest.identity == make_run_identity(command(run, original), 4, provenance["run_id"])
    changed = make_run_identity(command(run, original), 4, "x")
    with pytest.raises(UserError, match="another run's"):
        check_checkpoint_identity(changed, manifest.step, manifest.identity, run / CONFIG_FILE)
