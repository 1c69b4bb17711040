"""Keys that had another name in an earlier version, for what runs have written down: nobody types the old names.

A run folder's config.yaml and the manifests of its checkpoints are read under the names of today, and stay as they are:
both are sealed by a digest. On a command line and in a recipe an old name is a mistake (aliases.py).
"""

from collections.abc import Mapping
from typing import Any

# Dotted key of an earlier version -> what it is called now. Both lie in the same depth of sections, and in no list.
RENAMED_KEYS = {"optimizer.name": "optimizer.kind"}


def rename_old_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key, as a manifest has them, under the names of today."""
    renamed: dict[str, Any] = {}
    for key, value in values.items():
        new = RENAMED_KEYS.get(key, key)
        is_taken = new != key and new in values  # no version wrote both: what is wrong then is to be seen
        renamed[key if is_taken else new] = value
    return renamed


def rename_old_fields(tree: dict[str, Any]) -> None:
    """The same for the tree of a config.yaml, in place, with the places of its keys kept."""
    for old, new in RENAMED_KEYS.items():
        *parents, old_field = old.split(".")
        new_field = new.rpartition(".")[2]
        node: Any = tree
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if isinstance(node, dict) and old_field in node and new_field not in node:
            items = [(new_field if key == old_field else key, value) for key, value in node.items()]
            node.clear()
            node.update(items)
