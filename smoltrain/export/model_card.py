"""The model card of an export: README.md, as the Hugging Face Hub shows it."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smoltrain.config.schema import Config, DataSection, ExportSection, SourceSection
from smoltrain.evaluation.results import Evaluation, read_evaluation
from smoltrain.export.card_metadata import (
    STDERR_SUFFIX,
    VALIDATION_RESULTS,
    list_begun_phases,
    name_task,
    write_card_metadata,
)
from smoltrain.export.markdown_text import escape_markdown, fence_code, quote_code
from smoltrain.export.marker import ExportSource
from smoltrain.files import read_jsonl
from smoltrain.inference.load import LoadedModel
from smoltrain.model.build import count_parameters
from smoltrain.model.hf_config import SMOLTRAIN
from smoltrain.redact import redact_text, redact_url
from smoltrain.version import VERSION

MIN_TRANSFORMERS_VERSION = "4.46"  # the lowest version that loads an export and generates with it, of each class
TRAINING_LOSS = "train/loss_nats_per_token"
SOURCE_TOKENS_PREFIX = "data/tokens_by_source/"  # as in run/track.py, on whose floor this room stands
MEMORISATION = {
    "memorisation/share_of_13_grams": "13-grams written after held-out prompts that stand in the training tokens",
    "memorisation/recalled_share_of_13_grams": "the same after training prompts",
    "memorisation/held_out_share_of_13_grams": "the same of held-out text itself",
}
MEASURED_PREFIXES = ("validation/", "memorisation/")  # of the weights of one step: they say nothing of later ones
CURVE_FILE = "loss.png"
NUM_SAMPLES = 3
MAX_SAMPLE_CHARACTERS = 600


def build_model_card(
    loaded: LoadedModel, hf_config: dict[str, Any], source: ExportSource, about: ExportSection, *, has_curve: bool
) -> str:
    """The whole card. It names no path of the machine that trained: of local data only the last part.

    `about` is what its author says; with `has_curve` CURVE_FILE lies beside it.
    Errors: UserError for a damaged file of evaluations.
    """
    class_name = hf_config["architectures"][0]
    name = source.run
    last: dict[str, Any] = {}
    evaluation: Evaluation | None = None
    if loaded.config is not None and loaded.step is not None:
        last = read_last_metrics(loaded.folder / "metrics.jsonl", loaded.step)
        evaluation = read_evaluation(loaded.folder, loaded.step)
    front = write_card_metadata(name, hf_config["model_type"], about, loaded.config, last, evaluation, loaded.step)
    made_by = "trained with" if loaded.config else "converted by"
    sections = [
        f"---\n{front}\n---",
        f"# {escape_markdown(name)}",
        *_describe_unfinished(source),
        f"A causal language model, {made_by} smoltrain {VERSION}.",
        _format_table(("", ""), list(_model_facts(loaded, class_name, about).items())),
    ]
    if loaded.config is not None and loaded.step is not None:
        sections += _describe_training(loaded.config, loaded.step, source, last, has_curve=has_curve)
        sections += _describe_results(last, evaluation)
        sections += _describe_samples(loaded.folder / "samples.jsonl", loaded.step)
    sections += [
        f"## How to load it\n\nWith transformers {MIN_TRANSFORMERS_VERSION} or newer:",
        f"```python\n{_loading_example(name, class_name == SMOLTRAIN)}```",
        *_describe_limits(loaded, last),
    ]
    return "\n\n".join(sections) + "\n"


def read_last_metrics(file: Path, step: int) -> dict[str, Any]:
    """The last value of each metric at or before `step`, of evaluations at this very one; {} without the file."""
    last: dict[str, Any] = {}
    for line in read_jsonl(file):
        if line["step"] <= step:
            is_of_step = line["step"] == step
            last |= {
                name: value for name, value in line.items() if is_of_step or not name.startswith(MEASURED_PREFIXES)
            }
    return last


def _describe_unfinished(source: ExportSource) -> Iterator[str]:
    if source.unfinished_label is not None:
        yield f"**{source.unfinished_label}.** These weights are from before the end of the training plan."


def _model_facts(loaded: LoadedModel, class_name: str, about: ExportSection) -> dict[str, str]:
    section = loaded.model.section
    facts = {
        "class": f"`{class_name}`",
        "parameters": f"{count_parameters(loaded.model):,}",
        "weights": loaded.dtype_name,
        "vocabulary": f"{section.vocab_size:,} tokens",
        "context": f"{section.max_position_embeddings:,} tokens",
        "licence": escape_markdown(about.license_name or about.license or "not stated by its author"),
    }
    if about.language:
        facts["language"] = ", ".join(about.language)
    return facts


def _describe_training(
    config: Config, step: int, source: ExportSource, last: dict[str, Any], *, has_curve: bool
) -> list[str]:
    facts = _training_facts(config, last, step, source.last_step)
    sections = [f"## Training\n\n{_format_table(('', ''), list(facts.items()))}"]
    if config.data.sources:
        sections.append(_format_table(("source", "data", "share"), _list_sources(config.data, last)))
    if has_curve:
        sections.append(f"![Training and validation loss over the steps of the run]({CURVE_FILE})")
    return sections


def _training_facts(config: Config, last: dict[str, Any], step: int, last_step: int | None) -> dict[str, str]:
    """Recipe, steps, data, tokens, rate and batch."""
    rows: dict[str, str] = {}
    if config.run.recipe:
        rows["recipe"] = escape_markdown(config.run.recipe)
    phases = "; ".join(f"{phase.name}: {phase.num_steps:,} steps, {phase.schedule}" for phase in config.phases)
    rows["steps"] = f"{step:,} of {last_step:,} ({phases})"
    rows["data"] = "the sources below" if config.data.sources else _describe_source(config.data)
    if "data/tokens" in last:
        rows["tokens seen"] = f"{last['data/tokens']:,} in rows of {config.batch.sequence_length:,}"
    if "data/repeat_factor" in last:
        rows["times that each row was seen"] = f"{last['data/repeat_factor']:.2f}"
    rows["optimizer"] = config.optimizer.kind
    rates = [phase.lr for phase in list_begun_phases(config, step) if phase.lr is not None]
    if rates:
        rows["peak learning rate"] = f"{max(rates):g}"
    if TRAINING_LOSS in last:
        rows["training loss of the last step, nats per token"] = f"{last[TRAINING_LOSS]:.4f}"
    return rows


def _list_sources(data: DataSection, last: dict[str, Any]) -> list[tuple[str, ...]]:
    """(name, what it is, share): of the tokens seen where these were counted, else of the weights."""
    counted = {part.name: last.get(SOURCE_TOKENS_PREFIX + part.name, 0) for part in data.sources}
    total = sum(counted.values())
    if not total:
        counted = {part.name: part.weight for part in data.sources}
        total = sum(counted.values())
    return [
        (escape_markdown(part.name), _describe_source(part), f"{counted[part.name] / total:.1%}")
        for part in data.sources
    ]


def _describe_source(source: SourceSection) -> str:
    if source.hub:
        return f"[{escape_markdown(source.hub)}](https://huggingface.co/datasets/{_url_part(source.hub)})"
    if source.package:
        link = f"[{escape_markdown(source.package)}](https://pypi.org/project/{_url_part(source.package)}/)"
        return f"files {quote_code(source.pattern)} of the Python package {link}"
    path = redact_url(source.path or "")
    _, is_url, rest = path.partition("://")
    if is_url:
        return f"files behind a URL, {quote_code(Path(re.split('[?#]', rest)[0]).name)}"
    return f"local files, {quote_code(Path(path).name)}"


def _url_part(name: str) -> str:
    return re.sub(r"[^\w./-]", "", name, flags=re.ASCII)


def _describe_results(last: dict[str, Any], evaluation: Evaluation | None) -> Iterator[str]:
    rows: list[tuple[str, ...]] = []
    for metric, (_, words) in VALIDATION_RESULTS.items():
        if metric in last:
            rows.append(("held-out documents", words, f"{last[metric]:.4f}"))
    if evaluation is not None:
        rows += _list_task_results(evaluation)
    for metric, words in MEMORISATION.items():
        if metric in last:
            rows.append(("memorisation", words, f"{last[metric]:.1%}"))
    if rows:
        yield f"## Evaluation\n\n{_format_table(('on', 'metric', 'value'), rows)}"


def _list_task_results(evaluation: Evaluation) -> Iterator[tuple[str, ...]]:
    """(task, metric, value with its standard error)."""
    for task, metrics in evaluation["tasks"].items():
        name = escape_markdown(name_task(task, evaluation))
        for metric, value in metrics.items():
            if metric.endswith(STDERR_SUFFIX):
                continue
            error = metrics.get(metric + STDERR_SUFFIX, math.nan)
            beside = f" ± {error:.4f}" if math.isfinite(error) else ""
            yield (name, escape_markdown(metric), f"{value:.4f}{beside}")


def _describe_samples(file: Path, step: int) -> Iterator[str]:
    """What the run wrote at its last samples before this step, as it was written."""
    lines = [line for line in read_jsonl(file) if line["step"] <= step]
    newest = [line for line in lines if line["step"] == lines[-1]["step"]][:NUM_SAMPLES]
    if newest:
        texts = [redact_text(line["prompt"] + line["text"]) for line in newest]
        cut = [f"{text[:MAX_SAMPLE_CHARACTERS]}..." if len(text) > MAX_SAMPLE_CHARACTERS else text for text in texts]
        head = f"## Samples\n\nWritten at step {newest[0]['step']:,}, prompt and continuation, not chosen:"
        yield "\n\n".join([head, *map(fence_code, cut)])


def _describe_limits(loaded: LoadedModel, last: dict[str, Any]) -> Iterator[str]:
    limits = [
        "It goes on with a text. Nothing has taught it to follow instructions or to refuse, and what it says may be "
        "wrong, offensive or copied.",
        f"It reads at most {loaded.model.section.max_position_embeddings:,} tokens.",
    ]
    if loaded.config is not None:
        limits.append("It knows what its training data say, and their errors and leanings with it.")
        if not any(metric in last for metric in MEMORISATION):
            limits.append("How much of its training text it repeats word for word was not measured.")
    yield "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


def _format_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _loading_example(name: str, is_own_class: bool) -> str:
    remote = ", trust_remote_code=True" if is_own_class else ""
    note = "# The class is in this folder's modeling_smoltrain.py, hence trust_remote_code.\n" if is_own_class else ""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'{note}folder = "{name}"  # this folder, or its name on the Hub\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        f"model = AutoModelForCausalLM.from_pretrained(folder{remote})\n"
        'ids = tokenizer("Once upon a time", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**ids)[0], skip_special_tokens=True))\n"
    )
