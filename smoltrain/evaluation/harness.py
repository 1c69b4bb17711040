"""Tasks of lm-evaluation-harness: found, loaded, and measured on a model of ours.

A task asks for log-likelihoods of texts, and for texts that a model writes (harness_model.py). What is done with the
answers is the harness's own, so that its numbers can be compared with published ones.
"""

import contextlib
import functools
import json
import logging
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from smoltrain.errors import Problem, UserError, abbreviate_list, exception_message, suggest_choice
from smoltrain.evaluation.judge import Judge
from smoltrain.version import VERSION

try:
    from datasets import Dataset
    from lm_eval import evaluator
    from lm_eval.api import task as harness_task
    from lm_eval.tasks import TaskManager

    from smoltrain.evaluation.harness_model import HarnessModel
except ImportError as error:
    want = '`pip install -e ".[eval]"` in a checkout, or `pip install "WHEEL[eval]"` with the path of a wheel'
    raise UserError(Problem("lm-evaluation-harness is not installed", str(error), want, "the environment")) from None

LOCAL_TASK = "smoltrain_sentences"  # it needs no network
SENTENCES_FILE = Path(__file__).parent / "sentences.jsonl"
BUILT_IN_DATASETS = ("json", "csv", "text", "parquet", "arrow")  # names of readers, as against those of data sets
# As simple_evaluate seeds: tasks may shuffle their documents, and few-shot examples are drawn.
PYTHON_SEED = 0
NUMPY_SEED = 1234
FEWSHOT_SEED = 1234
BOOTSTRAP_ROUNDS = 1000  # for a standard error that has no formula: within about 2 % of that of many more
OFFLINE_VALUES = ("1", "ON", "YES", "TRUE")


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks with their documents, in the harness's own form."""

    loaded: Any  # TaskDict: tasks, groups
    notes: tuple[str, ...] = ()  # what is not as it was asked for


@dataclass(frozen=True)
class HarnessResults:
    """What the harness makes of the answers."""

    metrics: dict[str, dict[str, float]]  # by task or group
    num_documents: dict[str, int]  # that were measured
    num_fewshot: dict[str, int]
    versions: dict[str, str]  # of the tasks
    notes: tuple[str, ...] = field(default=())


# ---- tasks


def check_task_names(names: Sequence[str]) -> None:
    """Errors: UserError for a name that is no task, group or tag."""
    _make_manager(names)


def load_tasks(names: Sequence[str], *, fewshot: int | None = None, say: Callable[[str], None]) -> HarnessTasks:
    """Tasks, groups or tags with their documents; what is not on this machine is downloaded, which is said before.

    `fewshot` are the examples before each question; None: as each task says.
    Errors: UserError for unknown names, and for documents that cannot be had.
    """
    manager = _make_manager(names)
    specs: list[Any] = []
    for name in names:
        if name == LOCAL_TASK:
            specs.append(_describe_local_task())
        else:
            specs.append(name)
            for line in _describe_downloads(manager, name):
                say(line)
    with quiet_harness():
        try:
            loaded = manager.load(specs)
        except Exception as error:  # of datasets, the Hub, a task's own code: there is no common base
            want = "documents in the cache of the Hugging Face Hub, or a Hub that can be reached (HF_HUB_OFFLINE unset)"
            what = f"the documents of {', '.join(names)} cannot be loaded"
            saw = f"{type(error).__name__}: {exception_message(error)}"
            raise UserError(Problem(what, saw, want, "--tasks or evaluate.tasks")) from None
        notes = [note for task in loaded["tasks"].values() if (note := _set_fewshot(task, fewshot))]
    unsafe = [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe:
        want = "tasks that do not run what a model has written"
        raise UserError(Problem("a task would run code of the model", ", ".join(unsafe), want, "--tasks"))
    return HarnessTasks(loaded, tuple(notes))


def _make_manager(names: Sequence[str]) -> TaskManager:
    """One that knows all of the names. Errors: UserError for any other."""
    needs_index = any(name != LOCAL_TASK for name in names)
    manager = _open_manager(needs_index)
    known = {LOCAL_TASK, *manager.all_tasks}
    problems: list[Problem] = []
    for name in names:
        if name not in known:
            want = suggest_choice(name, known) if needs_index else LOCAL_TASK
            problems.append(Problem("no such task", repr(name), want, "--tasks or evaluate.tasks"))
    if problems:
        raise UserError(*problems)
    return manager


@functools.cache
def _open_manager(needs_index: bool) -> TaskManager:
    """With or without the harness's own tasks: to read their thousands of .yaml files takes seconds."""
    return TaskManager(include_defaults=needs_index)


def _describe_local_task() -> dict[str, Any]:
    """Which of two sentences is likelier: the right one counts. As BLiMP is scored (Warstadt et al. 2020)."""
    return {
        "task": LOCAL_TASK, "custom_dataset": _load_sentences, "test_split": "test", "fewshot_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "", "target_delimiter": "", "doc_to_target": 0,
        "doc_to_choice": "{{[right, wrong]}}", "metadata": {"version": 1.0},
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip


def _load_sentences(**_: Any) -> dict[str, Dataset]:
    lines = SENTENCES_FILE.read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def _describe_downloads(manager: TaskManager, name: str) -> list[str]:
    """A line on documents that lie on the Hub, if there are any."""
    places = sorted(_find_datasets(manager, name))
    if not places:
        return []
    shown = abbreviate_list(places)
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in OFFLINE_VALUES:
        return [f"{name}: reads {shown} from the cache of the Hugging Face Hub (HF_HUB_OFFLINE is set)"]
    return [f"{name}: reads {shown} of the Hugging Face Hub; what is not in its cache is downloaded now"]


def _find_datasets(manager: TaskManager, name: str) -> set[str]:
    """The data sets of a task, or of all tasks of a group or tag, that are no files of this machine."""
    entry = manager.task_index.get(name)
    if entry is None:
        return set()
    config = entry.cfg or {}
    children = [*entry.tags] if not config else []  # of a tag, which has no config of its own
    if isinstance(config.get("task"), list):
        children = [child if isinstance(child, str) else str(child.get("task", "")) for child in config["task"]]
    found = {place for child in children for place in _find_datasets(manager, child)}
    place = config.get("dataset_path")
    if isinstance(place, str) and place not in BUILT_IN_DATASETS and not Path(place).exists():
        found.add(place)
    return found


def _set_fewshot(task: Any, fewshot: int | None) -> str | None:
    """Give a task its number of examples, as simple_evaluate does; a line where it is not what was asked for."""
    own = task.get_config("num_fewshot")
    note = None
    if fewshot is not None and own == 0 and fewshot != 0:
        note = f"{task.config.task}: 0 examples, whatever --fewshot says: its authors allow no others"
    elif fewshot is not None:
        task.set_config(key="num_fewshot", value=fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return note


# ---- measuring


def measure_tasks(tasks: HarnessTasks, judge: Judge, limit: int | None = None) -> HarnessResults:
    """Measure each task on its first `limit` documents, or on all. Errors: those of the judge."""
    model = HarnessModel(judge)
    with quiet_harness():
        found: Any = evaluator.evaluate(
            model, tasks.loaded, limit=limit, bootstrap_iters=BOOTSTRAP_ROUNDS, log_samples=False
        )
    metrics = {name: _read_metrics(values) for name, values in found["results"].items()}
    samples = found.get("n-samples", {})
    return HarnessResults(
        metrics={name: values for name, values in metrics.items() if values},
        num_documents={name: counts["effective"] for name, counts in samples.items()},
        num_fewshot={name: int(number) for name, number in found["n-shot"].items()},
        versions={name: str(version) for name, version in found["versions"].items()},
        notes=(*tasks.notes, *model.describe_cuts()),
    )  # fmt: skip


def package_versions() -> dict[str, str]:
    """Of what a result depends on."""
    names = ("lm_eval", "torch", "datasets")
    return {"smoltrain": VERSION, **{name: metadata.version(name) for name in names}}


def _read_metrics(values: dict[str, Any]) -> dict[str, float]:
    """acc and acc_stderr for "acc,none" and "acc_stderr,none"; another filter than none stays behind the name."""
    read: dict[str, float] = {}
    for key, value in values.items():
        name, comma, filter_name = key.partition(",")
        if not comma or isinstance(value, bool) or not isinstance(value, int | float | np.number):
            continue  # an alias, a number of samples, a standard error that is "N/A"
        is_error = name.endswith("_stderr")
        metric = name.removesuffix("_stderr")
        if filter_name != "none":
            metric = f"{metric},{filter_name}"
        read[f"{metric}_stderr" if is_error else metric] = float(value)
    return read


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Inside, the harness finds its seeds, and is quiet; afterwards random numbers go on as if nothing had been.

    What it prints goes to stderr: on stdout stand results.
    """
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    log = logging.getLogger("lm_eval")
    level = log.level
    had_pool = os.environ.get("DISABLE_MULTIPROC")
    task_module: Any = harness_task
    bar = task_module.tqdm
    random.seed(PYTHON_SEED)
    np.random.seed(NUMPY_SEED)
    log.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"  # bootstrapping would fork this process, threads, GPU and all
    task_module.tqdm = lambda items, **_: items
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        task_module.tqdm = bar
        if had_pool is None:
            del os.environ["DISABLE_MULTIPROC"]
        log.setLevel(level)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
