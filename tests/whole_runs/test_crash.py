"""SIGKILL to real ranks at random moments, most of them in the middle of a save: nothing is lost, not even a bit.

A run of two ranks is killed a few times, started again each time by the same words, and let go in the end. It must then
have trained on the same rows, to the same losses and the same bits of weights, masters and moments, as one that nobody
disturbed. The moments within a save are met exactly: a rank stops itself (SIGSTOP) there, and the test kills it.
"""

import hashlib
import itertools
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import safetensors.torch
import torch

from smoltrain import files
from smoltrain.checkpoint.manifest import MANIFEST_FILE, Manifest, list_checkpoint_steps, step_folder, verify_checkpoint
from smoltrain.run.row_ledger import LEDGER_FILE
from smoltrain.run.verify import compare_runs, verify_run
from tests import launches, tiny
from tests.zygote import zygote

SIZE, STEPS, KILLS_PER_RUN = 2, 12, 5
SETTINGS = ("model.dropout=0.1", "checkpoint.every=2", "sample.every=0", "track.gradients_every=0")
LIFE_S = 3.0  # about what a life lasts, from the fork to the last step

# ---- the moments of a save


@dataclass(frozen=True)
class Stage:
    """A stage of a save, or of training, as the calls of one function in one module."""

    owner: Any
    function: str
    belongs: Callable[..., bool]  # of the calls, by their arguments
    calls: int  # from one save to the next, about
    first_rank_only: bool = False
    writes: int | None = None  # the argument that is the path of what the call writes, or the open file


def in_checkpoints(path: Any) -> bool:
    """Whether a path, or an open file, is in a checkpoint, or is the folder of all."""
    return "/checkpoints" in str(Path(f"/proc/self/fd/{path}").readlink() if isinstance(path, int) else path)


def stages() -> dict[str, Stage]:
    from smoltrain.engine.engine import Engine
    from smoltrain.training import step

    def is_manifest(path: Path, *_: Any, **__: Any) -> bool:
        return path.name.startswith(MANIFEST_FILE)

    def is_of_the_start(path: Path, *_: Any, **__: Any) -> bool:
        return path.name in ("config.yaml.tmp", "metrics.jsonl.tmp", "samples.jsonl.tmp")

    def is_old(path: Any, **_: Any) -> bool:
        return str(path).endswith((".pt", ".safetensors", ".json"))

    return {
        "start": Stage(Path, "write_text", is_of_the_start, 1, True, writes=0),
        "a step": Stage(step, "start_update", lambda *_, **__: True, 2),
        "copy to the host": Stage(Engine, "training_state", lambda *_: True, 1),
        "shard": Stage(torch, "save", lambda _, path: in_checkpoints(path), 3, writes=1),
        "weights": Stage(safetensors.torch, "serialize_file", lambda *_, **__: True, 1, True, writes=1),
        "fsync": Stage(os, "fsync", in_checkpoints, 6),
        "hash": Stage(hashlib, "file_digest", lambda file, _: in_checkpoints(file.name), 3),
        "manifest": Stage(Path, "write_text", is_manifest, 1, True, writes=0),
        "rename": Stage(os, "replace", lambda _, new: in_checkpoints(new), 2, True),
        "old one set aside": Stage(os, "rename", lambda old, _: in_checkpoints(old), 1, True),
        "old one deleted": Stage(os, "unlink", is_old, 6, True),
    }


When = Literal["before", "within", "after"]  # within: where half of what the call writes is there


def stop_at(rank: int, stage: str, nth: int, when: When) -> None:
    """Make this rank stop itself before, within or after the n-th call of a stage."""
    if int(os.environ["RANK"]) != rank:
        return
    place, seen = stages()[stage], 0
    real = getattr(place.owner, place.function)

    def stopping(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        belongs = place.belongs(*args, **kwargs)
        seen += belongs
        if seen != nth or not belongs:
            return real(*args, **kwargs)
        if when == "before":
            stop()
        result = real(*args, **kwargs)
        if when == "within":
            assert place.writes is not None
            halve(args[place.writes])
        elif when == "after":
            stop()
        return result

    setattr(place.owner, place.function, stopping)


def halve(written: Any) -> None:
    """Stop where only the first half of a file, given by its path or open, is there."""
    if hasattr(written, "flush"):
        written.flush()
    path = Path(written.name if hasattr(written, "flush") else written)
    content = path.read_bytes()
    os.truncate(path, len(content) // 2)
    stop()
    path.write_bytes(content)


def stop() -> None:
    """Stop the whole process, right here: a signal to the own thread is there before the call returns."""
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


@dataclass(frozen=True)
class Moment:
    """When a life ends, and how."""

    stage: str  # or "any": after seconds
    rank: int
    nth: int
    when: When
    seconds: float
    killed: tuple[int, ...]  # at once, with a SIGKILL
    grace_s: float  # until the others are killed too, who have noticed or not


def moments(seed: int) -> Iterator[Moment]:
    """Endlessly: each stage once and three kills at any time, in an order of their own, and again."""
    dice, known = random.Random(seed), stages()
    while True:
        for stage in dice.sample([*known, "any", "any", "any"], len(known) + 3):
            place = known.get(stage)
            rank = 0 if place and place.first_rank_only else dice.randrange(SIZE)
            yield Moment(
                stage,
                rank,
                nth=dice.randint(1, 2 * place.calls) if place else 0,
                when=dice.choice(["before", "after"]) if not place or place.writes is None else "within",
                seconds=dice.uniform(0, LIFE_S),
                killed=dice.choice([(rank,), (rank,), (1 - rank,), (0, 1)]),
                grace_s=dice.choice([0, 0.1, 1.0]),
            )


# ---- lives


def words(folder: Path, background: bool = True) -> list[str]:
    return tiny.words(folder, *SETTINGS, f"checkpoint.background={str(background).lower()}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    life = zygote().train(words(folder), SIZE, folder / "log")
    assert life.end() == [0] * SIZE, life.text()
    return folder / "runs" / "quickstart"


def killed_life(arguments: list[str], log: Path, moment: Moment) -> bool:
    """One life that ends by SIGKILL; False where it ended by itself before its moment came."""
    sabotage = () if moment.stage == "any" else (stop_at, moment.rank, moment.stage, moment.nth, moment.when)
    life = zygote().train(arguments, SIZE, log, *sabotage)
    until = time.monotonic() + (moment.seconds if moment.stage == "any" else 1000)
    life.wait(lambda states: time.monotonic() > until or any(s == "stopped" or isinstance(s, int) for s in states))
    states = life.states()
    life.kill(*moment.killed)
    life.resume()
    if moment.grace_s:
        time.sleep(moment.grace_s)
    life.kill()
    ended = life.end()
    if all(state == 0 for state in ended):
        return False
    assert any(state == -signal.SIGKILL for state in ended), f"{states}, then {ended}\n{life.text()}"
    return True


def check_checkpoints(run: Path, at_least: int) -> int:
    """Each one that is published verifies, and none is lost; the newest step, with which the next life begins."""
    for step in (found := list_checkpoint_steps(run / "checkpoints")):
        manifest = verify_checkpoint(step_folder(run / "checkpoints", step))
        assert isinstance(manifest, Manifest), manifest
    newest = found[-1] if found else 0
    assert newest >= at_least
    return newest


def check_same(run: Path, reference: Path, last_step: int = STEPS) -> None:
    """Rows, losses, and every bit that a checkpoint of the last step holds."""
    assert (run / LEDGER_FILE).read_bytes() == (reference / LEDGER_FILE).read_bytes()
    assert compare_runs(str(run), str(reference)), "the rows of both"
    assert verify_run(run), "the ledger, and all that is in each checkpoint"
    assert numbers(run) == numbers(reference), "each step once, and the same numbers"
    assert not list((run / "checkpoints").glob("*.tmp")), "nothing half done is left"
    ours, theirs = (step_folder(folder / "checkpoints", last_step) for folder in (run, reference))
    names = sorted(
        str(path.relative_to(theirs)) for path in theirs.rglob("*") if path.suffix in (".pt", ".safetensors")
    )
    assert len(names) == 3 + 2 * SIZE - 1
    for name in names:
        assert same_bits(tensors(ours / name), tensors(theirs / name)), name


def numbers(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock, or the memory of a process, says."""
    own = ("time_s", "speed/", "memory/")
    lines = [{key: v for key, v in line.items() if not key.startswith(own)} for line in launches.metrics(run)]
    return [line for line in lines if len(line) > 1]


def tensors(path: Path) -> Any:
    from smoltrain.engine.shards import ALLOWED_SHARD_CLASSES

    return (
        safetensors.torch.load_file(path)
        if path.suffix == ".safetensors"
        else files.read_tensors(path, ALLOWED_SHARD_CLASSES)
    )


def same_bits(ours: Any, theirs: Any) -> bool:
    """Whether two trees are equal, tensors byte by byte."""
    if isinstance(ours, torch.Tensor):
        return ours.dtype == theirs.dtype and ours.shape == theirs.shape and (
            ours.contiguous().view(-1).view(torch.uint8).equal(theirs.contiguous().view(-1).view(torch.uint8))
            if ours.numel() and ours.dim() else ours.equal(theirs)
        )  # fmt: skip
    if isinstance(ours, dict):
        return list(ours) == list(theirs) and all(same_bits(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True))
    return getattr(ours, "__dict__", ours) == getattr(theirs, "__dict__", theirs)


def kill_many(folder: Path, undisturbed: Path, seed: int, kills: int) -> Counter[str]:
    """So many lives ended by SIGKILL, in runs of a few each; how many in each stage."""
    met: Counter[str] = Counter()
    run, plan, dice, lives = folder / "runs" / "quickstart", moments(seed), random.Random(seed), itertools.count()
    moment = next(plan)
    while met.total() < kills:
        arguments, newest, first = words(folder, background=dice.random() < 0.7), 0, met.total()
        while met.total() < min(first + KILLS_PER_RUN, kills):
            log = folder / f"log-{next(lives)}"
            if not killed_life(arguments, log, moment):
                moment = replace(moment, nth=1)  # the run was done before; in the next one it will come
                break
            met[moment.stage] += 1
            moment = next(plan)
            check_restored(log, newest)
            newest = check_checkpoints(run, newest)
        last = zygote().train(arguments, SIZE, folder / f"log-{next(lives)}")
        assert last.end() == [0] * SIZE, last.text()
        assert check_checkpoints(run, newest) == STEPS
        check_same(run, undisturbed)
        shutil.rmtree(run)
    return met


def check_restored(log: Path, newest: int) -> None:
    """A life that came so far began where the one before left off, and passed nothing over."""
    text = log.read_text(encoding="utf-8", errors="replace")
    assert "passed over" not in text
    if "step " in text and "loss" in text:
        assert ("restored step" in text) == (newest > 0)
    if "restored step" in text:
        assert f"restored step {newest} on" in text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_kill_in_each_stage_of_a_save_loses_nothing(tmp_path: Path, undisturbed: Path) -> None:
    met = kill_many(tmp_path, undisturbed, seed=1, kills=len(stages()) + 3)
    assert met == Counter([*stages(), "any", "any", "any"])


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_hundred_kills_lose_nothing(tmp_path: Path, undisturbed: Path) -> None:
    met = kill_many(tmp_path, undisturbed, seed=2, kills=100)
    print(met)
    assert met.keys() == {*stages(), "any"}
