"""`smoltrain verify`: sound checkpoints pass, whatever is wrong with one is named, and its loss comes out again."""

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from smoltrain import files
from smoltrain.checkpoint.manifest import MANIFEST_FILE, Manifest, read_manifest, step_folder, write_manifest
from smoltrain.cli import main
from smoltrain.engine.reshard import MASTER_KEYS, OPTIMIZER_KEYS
from smoltrain.errors import BAD_INPUT, DONE, FAULT
from smoltrain.run.row_ledger import LEDGER_FILE, read_row_history
from tests import tiny

Verified = tuple[int, list[str]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps of 4 rows, with checkpoints 4 and 8; it was evaluated at step 8 alone."""
    folder = tmp_path_factory.mktemp("inspection")
    done = tiny.train(folder, "run.stop_after=main", "checkpoint.every=4", "evaluate.every=8", "engine.precision=bf16")
    assert done.returncode == DONE, done.stderr
    return folder / "runs" / "quickstart"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(trained, tmp_path / "copied")


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> Callable[..., Verified]:
    def verify(*words: str | Path) -> Verified:
        with pytest.raises(SystemExit) as left:
            main(["verify", *map(str, words)])
        told = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return left.value.code, (told.out + told.err).splitlines()

    return verify


def step_8(run: Path) -> Path:
    return step_folder(run / "checkpoints", 8)


def manifest_of(folder: Path) -> Manifest:
    found = read_manifest(folder)
    assert isinstance(found, Manifest)
    return found


def reseal(folder: Path, **changes: Any) -> None:
    """Sign a checkpoint as it is now, as if it had been written so."""
    names = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST_FILE]
    records = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": files.file_sha256(folder / name)} for name in names
    }
    write_manifest(folder, replace(manifest_of(folder), **({"files": records} | changes)))


def shard_of(folder: Path, rank: int = 0) -> Path:
    (path,) = folder.glob(f"deepspeed/*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return path


def rewrite(path: Path, change: Callable[[Any], object]) -> None:
    """Change what a file of training holds."""
    from smoltrain.engine.shards import ALLOWED_SHARD_CLASSES

    tree = files.read_tensors(path, ALLOWED_SHARD_CLASSES)
    change(tree)
    torch.save(tree, path)


# --- what is sound


def test_a_sound_run_has_a_line_for_its_rows_and_one_for_each_checkpoint(run: Path, verify: Callable[..., Verified]):
    code, (rows, *lines, tokens) = verify(run)
    assert (code, rows.startswith(f"{run}: 32 rows (steps 1 to 8)")) == (0, True)
    assert re.fullmatch(
        rf"{run}/data: 8 files of tokens \([0-9.]+ MiB\) and the tokenizer are as they were written", tokens
    )
    sizes = [sum(record["bytes"] for record in manifest_of(p).files.values()) / 2**20 for p in checkpoints(run)]
    assert lines == [
        f"{at}: 4 files ({size:.1f} MiB) are as they were written, 20 tensors fit the config, "
        f"masters and optimizer state of 28,832 parameters by one rank are finite, {num} rows as in ledger.bin"
        for at, size, num in zip(checkpoints(run), sizes, (16, 32), strict=True)
    ]


def checkpoints(run: Path) -> list[Path]:
    return [step_folder(run / "checkpoints", step) for step in (4, 8)]


def test_one_checkpoint_alone_and_its_loss(run: Path, verify: Callable[..., Verified], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(run.parent)
    stored = manifest_of(step_8(run)).validation_loss
    assert stored is not None
    code, lines = verify("copied/checkpoints/step-00000008/", "--forward")
    assert (code, len(lines)) == (0, 1)
    assert lines[0].startswith("copied/checkpoints/step-00000008: 4 files")
    assert f" nats per token on 8 rows, {stored:.5f} when it was saved (tolerance 0.003: in bf16 " in lines[0]
    assert float(lines[0].partition("validation loss ")[2].split()[0]) == pytest.approx(stored, rel=1e-4)
    code, lines = verify("copied/checkpoints/step-00000004", "--forward")
    assert (code, "nats per token on 8 rows (none was stored to compare with)" in lines[0]) == (0, True)


# --- what is wrong


def spoil_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def spoil(at: Path) -> None:
        tensors = load_file(at / "model.safetensors")
        change(tensors)
        save_file(tensors, at / "model.safetensors")
        reseal(at)

    return spoil


def spoil_file(name: str, change: Callable[[Any], object]) -> Callable[[Path], None]:
    def spoil(at: Path) -> None:
        (path,) = at.rglob(name)
        rewrite(path, change)
        reseal(at)

    return spoil


def spoil_manifest(**changes: Any) -> Callable[[Path], None]:
    def spoil(at: Path) -> None:
        loader = manifest_of(at).loader
        reseal(at, **(changes | {"loader": loader | changes.get("loader", {})}))

    return spoil


def optimizer(tree: Any) -> Any:
    return tree["optimizer_state_dict"]


def flip_a_bit(at: Path) -> None:
    content = bytearray((at / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (at / "model.safetensors").write_bytes(content)


def remove_shard(at: Path) -> None:
    shard_of(at).unlink()
    reseal(at)


def add_stray(at: Path) -> None:
    shutil.copy(shard_of(at), at / "deepspeed" / "zero_pp_rank_1_mp_rank_00_optim_states.pt")


FAULTS: list[tuple[Callable[[Path], None], str]] = [
    (flip_a_bit, "model.safetensors is not what was written (SHA-256 differs)"),
    (lambda at: (at / "rank-00000.pt").unlink(), "rank-00000.pt is missing"),
    (spoil_weights(lambda t: t["norm.weight"].fill_(math.nan)), "norm.weight holds values that are no numbers"),
    (
        spoil_weights(lambda t: t.update({"norm.weight": torch.ones(16)})),
        "norm.weight has another shape: saw (16,), want (32,)",
    ),
    (
        spoil_weights(lambda t: t.update({name: x.float() for name, x in t.items()})),
        "model.safetensors is in torch.float32, but the checkpoint in bf16",
    ),
    (
        spoil_file("*optim*", lambda t: optimizer(t)[OPTIMIZER_KEYS[0]]["state"][0]["exp_avg_sq"][-1].fill_(math.nan)),
        "exp_avg_sq of layers.1.mlp.down_proj.weight is not finite",
    ),
    (
        spoil_file("*optim*", lambda t: optimizer(t)[MASTER_KEYS[0]][0][0].fill_(math.inf)),
        "masters of embed_tokens.weight is not finite",
    ),
    (
        spoil_file("*optim*", lambda t: optimizer(t)[MASTER_KEYS[0]].__setitem__(1, torch.ones(130))),
        "masters has 130 elements, which end within norm.weight",
    ),
    (
        spoil_file("*optim*", lambda t: optimizer(t).pop(MASTER_KEYS[0])),
        "is not laid out as DeepSpeed does it (KeyError: 'single_partition_of_fp32_groups')",
    ),
    (
        spoil_file("*model_states*", lambda t: t["param_shapes"][1].pop("norm.weight")),
        "of the optimizer states, norm.weight is missing, in the config (32,)",
    ),
    (remove_shard, "it has the optimizer states of 0 ranks, not of 1"),
    (add_stray, "deepspeed/zero_pp_rank_1_mp_rank_00_optim_states.pt is no file of this checkpoint"),
    (spoil_manifest(world_size=2), "it has the random states of 1 ranks, not of 2"),
    (spoil_manifest(phase="continuation"), "its phase is 'continuation', in the run's config.yaml 'main'"),
    (spoil_manifest(wandb_id="other"), "its W&B id is 'other', in the run's config.yaml "),
    (spoil_manifest(step=7), "manifest.json is that of step 7"),
    (spoil_manifest(loader={"position": 28}), "it has used 28 rows, but 8 steps take 4 each"),
    (spoil_manifest(loader={"position": 36}), "its first 36 rows are not those of "),
    (spoil_manifest(loader={"ledger": "0" * 64}), "its first 32 rows are not those of "),
    (spoil_manifest(loader={"identity": {}}), "the checkpoint is of another sequence of rows: seed: saw 1234"),
    (spoil_manifest(loader={"weights": None}), "its place in the data cannot be read (TypeError"),
]


@pytest.mark.parametrize(("spoil", "message"), FAULTS, ids=[message.split(":")[0][:50] for _, message in FAULTS])
def test_what_is_wrong_is_named(
    run: Path, verify: Callable[..., Verified], spoil: Callable[[Path], None], message: str
):
    spoil(step_8(run))
    code, lines = verify(run)
    assert code == FAULT
    wrong = [line for line in lines if line.startswith(f"{step_8(run)} fails verification: ")]
    assert any(message in line for line in wrong), lines
    assert not any(line.startswith(f"{run}/checkpoints/step-00000004 fails") for line in lines), "the other is sound"


def test_one_checkpoint_is_judged_without_the_others(run: Path, verify: Callable[..., Verified]):
    flip_a_bit(step_8(run))
    assert verify(step_8(run))[0] == FAULT
    assert verify(run / "checkpoints" / "step-00000004")[0] == 0


def test_rows_that_the_metrics_do_not_know(run: Path, verify: Callable[..., Verified]):
    at = step_folder(run / "checkpoints", 4)
    before = manifest_of(at).loader
    chain = read_row_history(run).chain_after(20)
    reseal(at, loader=before | {"position": 20, "ledger": chain})
    code, lines = verify(at)
    assert (code, lines[1].split(": ", 1)[1]) == (
        FAULT, "it has used 20 rows, but metrics.jsonl has others for steps 4 and 5",
    )  # fmt: skip


class Creates:
    """A pickle that would make a folder."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._path),)


def test_no_code_runs(run: Path, verify: Callable[..., Verified], tmp_path: Path):
    torch.save(Creates(tmp_path / "ran"), shard_of(step_8(run)))
    reseal(step_8(run))
    code, lines = verify(step_8(run))
    assert code == FAULT
    assert "holds more than tensors and is refused: posix.mkdir" in lines[1]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "spoil", [spoil_manifest(validation_loss=5.0), spoil_weights(lambda t: t["norm.weight"].mul_(1.05))]
)
def test_another_loss_than_when_it_was_saved(run: Path, verify: Callable[..., Verified], spoil: Callable[[Path], None]):
    spoil(step_8(run))
    assert verify(step_8(run))[0] == 0, "nothing else is wrong with it"
    code, lines = verify(step_8(run), "--forward")
    assert code == FAULT
    assert "fails verification: validation loss " in lines[1]


# --- runs that are not whole, and mistakes


def test_a_run_whose_ledger_is_gone(run: Path, verify: Callable[..., Verified]):
    (run / LEDGER_FILE).unlink()
    code, lines = verify(run)
    assert code == FAULT
    assert lines[0].startswith("there are no rows to verify: saw no ledger.bin")
    assert [line.rpartition(", ")[2] for line in lines[1:-1]] == ["16 rows", "32 rows"]


def test_a_run_whose_data_are_gone(run: Path, verify: Callable[..., Verified]):
    shutil.rmtree(run / "data")
    code, lines = verify(run)
    assert code == 0
    assert "32 rows as in ledger.bin (not compared with the data: the data are not prepared: saw no " in lines[2]
    assert "data: not looked into (the data are not prepared: saw no " in lines[-1]
    code, lines = verify(run, "--forward")
    assert (code, lines[-1].startswith("error: the data are not prepared")) == (BAD_INPUT, True)


@pytest.mark.parametrize(
    "name", ["data/data/train-00000.bin", "data/data/validation.starts", "tokenizer/tokenizer_config.json"]
)
def test_a_bit_of_the_tokens_is_found(run: Path, verify: Callable[..., Verified], name: str):
    path = run / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    code, lines = verify(run)
    assert code == FAULT
    assert lines[-1].startswith(
        f"{run}/data fails verification: {name.removeprefix('data/').removeprefix('tokenizer/')}: "
    )
    assert path.read_bytes() == raw, "nothing is mended"


@pytest.mark.parametrize("damage", ["{}", "null", None])
def test_an_index_that_is_none_is_a_fault(run: Path, verify: Callable[..., Verified], damage: str | None):
    index = run / "data" / "index.json"
    index.unlink()
    index.mkdir() if damage is None else index.write_text(damage)
    code, lines = verify(run)
    assert code == FAULT
    assert "the index of the data is damaged: saw " in lines[-1]


def test_what_cannot_be_verified(run: Path, verify: Callable[..., Verified], tmp_path: Path):
    def refusal(*words: str | Path) -> str:
        code, (line,) = verify(*words)
        assert code == BAD_INPUT
        return line

    assert "no checkpoint of this step: saw 9, want one of 4, 8; change the RUN argument" in refusal(
        run / "checkpoints" / "step-00000009"
    )
    assert "this is one checkpoint of a run: saw" in refusal(run, step_8(run))
    assert "two runs are compared by their rows alone: saw --forward with OTHER" in refusal(run, run, "--forward")
    assert "no such run" in refusal(tmp_path / "nowhere")
    (run / "config.yaml").write_text(json.dumps({"provenance": {"rows_per_step": 4}}))
    assert verify(run)[0] == BAD_INPUT, "a config that is none"
