"""Which parameters of a model are hidden matrices: those of the linear maps between its embedding and its head.

They are told apart by what torch and transformers call things, as the model may be anybody's. What is in doubt is no
hidden matrix: to AdamW, which has the rest, every parameter is alike.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Parameters = dict[str, nn.Parameter]  # by name, in the order of the model


@dataclass(frozen=True)
class ParameterSplit:
    """All parameters that are trained, each once."""

    hidden: Parameters
    tables: Parameters  # embeddings, and the head
    others: Parameters  # of two dimensions or more: stacks of experts, what is no linear map
    vectors: Parameters  # norms, biases

    def describe(self) -> str:
        """For the console: what Muon has, and what AdamW."""
        left = [
            _count_noun(len(self.tables), "table"),
            _count_noun(len(self.others), "other tensor"),
            _count_noun(len(self.vectors), "vector"),
        ]
        rest = _join_words([words for words in left if words])
        hidden = _count_noun(len(self.hidden), "hidden matrix", "hidden matrices")
        num_rest = count_elements({**self.tables, **self.others, **self.vectors})
        if not rest:
            return f"muon for {hidden} ({_millions(count_elements(self.hidden))})"
        return f"muon for {hidden} ({_millions(count_elements(self.hidden))}), adamw for {rest} ({_millions(num_rest)})"


def split_parameters(model: nn.Module) -> ParameterSplit:
    """A hidden matrix has two sides longer than 1, "weight" in its name, and is neither an embedding nor the head."""
    table_weights = _find_tables(model)
    split = ParameterSplit({}, {}, {}, {})
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter in table_weights:
            split.tables[name] = parameter
        elif parameter.dim() < 2:
            split.vectors[name] = parameter
        # nn.Linear, transformers' Conv1D and nn.MultiheadAttention call it so; Mamba's A_log is no linear map.
        elif parameter.dim() == 2 and min(parameter.shape) > 1 and "weight" in name.rpartition(".")[2]:
            split.hidden[name] = parameter
        else:
            split.others[name] = parameter
    return split


def count_elements(parameters: Parameters) -> int:
    """Numbers in all of them."""
    return sum(parameter.numel() for parameter in parameters.values())


def _find_tables(model: nn.Module) -> set[torch.Tensor]:
    """The weights of all embeddings, and of the head: a tied one is there once."""
    tables: set[torch.Tensor] = set()
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            tables.add(module.weight)
    return tables | _find_head(model)


def _find_head(model: nn.Module) -> set[torch.Tensor]:
    """What `get_output_embeddings` gives, which transformers' models have; else the last map to the vocabulary."""
    for module in model.modules():
        find = getattr(module, "get_output_embeddings", None)
        head = find() if callable(find) else None
        if isinstance(head, nn.Module) and isinstance(head.weight, nn.Parameter):
            return {head.weight}
    vocabulary = _vocabulary_size(model)
    maps = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    return set([weight for weight in maps if weight.size(0) == vocabulary][-1:])


def _vocabulary_size(model: nn.Module) -> int | None:
    """As the section of a LanguageModel says; of another module, the rows of its first embedding."""
    section: Any = getattr(model, "section", None)
    if section is not None:
        return section.vocab_size
    rows = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    return rows[0] if rows else None


def _count_noun(count: int, noun: str, plural: str | None = None) -> str:
    """ "" for none."""
    if count == 0:
        return ""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def _join_words(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f}M parameters" if count >= 1e6 else f"{count:,} parameters"
