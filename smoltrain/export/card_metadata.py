"""What the Hub reads of a model card: the YAML in front of it, by which models are found and their results listed."""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from smoltrain.config.schema import Config, ExportSection, PhaseSection
from smoltrain.evaluation.results import Evaluation, is_limited
from smoltrain.schedule import Plan

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

TASK = "text-generation"
# Metric of a run -> its type on the Hub, and how the card calls it.
VALIDATION_RESULTS = {
    "validation/loss_nats_per_token": ("loss", "validation loss, nats per token"),
    "validation/perplexity": ("perplexity", "validation perplexity"),
    "validation/bits_per_byte": ("bits_per_byte", "validation loss, bits per byte"),
}
STDERR_SUFFIX = "_stderr"


def write_card_metadata(
    name: str, model_type: str, about: ExportSection, config: Config | None, last: Mapping[str, Any],
    evaluation: Evaluation | None, step: int | None = None,
) -> str:  # fmt: skip
    """The YAML of a model's card, without its fences; nothing is invented.

    `last` are the last metrics of the run up to `step`, which is that of the weights.
    """
    from huggingface_hub import ModelCardData

    results = [*_validation_results(config, last, step), *_task_results(evaluation)]
    values = {
        "language": list(about.language) or None,
        "license": about.license,
        "license_name": about.license_name,
        "library_name": "transformers",
        "pipeline_tag": TASK,
        "tags": ["smoltrain", TASK, "pytorch", "safetensors", model_type],
        "datasets": _hub_datasets(config, step) or None,
    }
    if results:
        values |= {"model_name": name, "eval_results": results}
    return ModelCardData(**values).to_yaml()


def name_task(task: str, evaluation: Evaluation) -> str:
    """A task as the card calls it: what was measured on a part of its documents says so."""
    details = evaluation["details"].get(task)
    if details is None or not is_limited(details):
        return task
    of_each = "" if details["documents"] else " of each of its tasks"
    return f"{task}, first {details['limit']:,} documents{of_each}"


def list_begun_phases(config: Config, step: int | None) -> list[PhaseSection]:
    """Those that the weights of a step have been trained in, be it in a part of one; None is the end of the plan."""
    return [phase.spec for phase in Plan(config.phases).phases if step is None or phase.first <= step]


def _hub_datasets(config: Config | None, step: int | None) -> list[str]:
    """The Hub's names of the data that any phase has trained on up to a step."""
    if config is None:
        return []
    phases = list_begun_phases(config, step)
    used = {name for phase in phases for name in (phase.mix or {})}
    takes_all = any(phase.mix is None for phase in phases)
    return [part.hub for part in config.data.parts if part.hub and (takes_all or part.name in used)]


def _validation_results(
    config: Config | None, last: Mapping[str, Any], step: int | None
) -> Iterator["EvalResult"]:  # fmt: skip
    datasets = _hub_datasets(config, step)
    # Files of validation_path need not be of the dataset.
    is_one = config is not None and len(datasets) == len(config.data.parts) == 1 and not config.data.validation_path
    dataset = datasets[0] if is_one else "held-out"
    for metric, (kind, words) in VALIDATION_RESULTS.items():
        if metric in last and math.isfinite(last[metric]):
            yield _make_result(dataset, "documents held out of the training data", kind, words, last[metric])


def _task_results(evaluation: Evaluation | None) -> Iterator["EvalResult"]:
    if evaluation is None:
        return
    for task, metrics in evaluation["tasks"].items():
        name = name_task(task, evaluation)
        for metric, value in metrics.items():
            if not metric.endswith(STDERR_SUFFIX) and math.isfinite(value):
                yield _make_result(task, name, metric, metric, value)


def _make_result(dataset: str, dataset_name: str, metric: str, metric_name: str, value: float) -> "EvalResult":
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type=TASK, task_name="Text generation", dataset_type=dataset, dataset_name=dataset_name,
        metric_type=metric, metric_name=metric_name, metric_value=round(value, 4),
    )  # fmt: skip
