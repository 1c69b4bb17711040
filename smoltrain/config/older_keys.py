"""Keys as earlier versions had them, for what runs have written down: nobody types the old names.

A run folder's config.yaml, the manifests of its checkpoints and its wandb.json are read as if this version had written
them, and stay as they are: the first two are sealed. On a command line and in a recipe an old name is a mistake, which
aliases.py answers.
"""

from collections.abc import Mapping
from typing import Any

# Dotted key of an earlier version -> what it is called now, in the same section.
RENAMED_KEYS = {"optimizer.name": "optimizer.kind"}
# Keys that are newer than some runs -> the value that every run had before.
NEWER_KEYS = {
    "optimizer.kind": "adamw",
    "optimizer.momentum": 0.95,  # of muon, which no such run had
    "optimizer.newton_schulz_steps": 5,
    "optimizer.embedding_lr_factor": 1.0,
}


def update_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key, as a manifest has them, under the names of today and with all keys."""
    updated: dict[str, Any] = {}
    for key, value in values.items():
        new = RENAMED_KEYS.get(key, key)
        is_taken = new != key and new in values  # no version wrote both: what is wrong then is to be seen
        updated[key if is_taken else new] = value
    return NEWER_KEYS | updated


def update_sections(tree: dict[str, Any]) -> None:
    """The same for sections of a config as a tree, in place; a section that is not there stays away."""
    for old, new in RENAMED_KEYS.items():
        section, _, old_name = old.partition(".")
        new_name = new.rpartition(".")[2]
        fields = tree.get(section)
        if isinstance(fields, dict) and old_name in fields and new_name not in fields:
            fields[new_name] = fields.pop(old_name)
    for key, before in NEWER_KEYS.items():
        section, _, name = key.partition(".")
        fields = tree.get(section)
        if isinstance(fields, dict):
            fields.setdefault(name, before)
