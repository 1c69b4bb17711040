"""Checkpoints that are whole or not there: written aside, hashed, named in a manifest, renamed, verified before use.

checkpoints/step-00000200/
    deepspeed/*.pt        DeepSpeed's shards: weights, fp32 masters, moments
    rank-00000.pt         one per rank: the state of its random number generators
    model.safetensors     the weights alone, in compute precision, for everything that is not training
    manifest.json         written last: step, world, loader state, SHA-256 of every other file and of itself

A folder whose name ends in .tmp is in the making, or on its way out; the next start sweeps it.
"""

from smoltrain.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    MODEL_STATES,
    RANDOM,
    SAVED,
    SHARD,
    WEIGHTS,
    Manifest,
    folder_of,
    lacking,
    last_saved,
    left,
    newest_valid,
    read_manifest,
    steps,
    strays,
    verify,
    write_manifest,
)
from smoltrain.checkpoint.restoring import restore
from smoltrain.checkpoint.retention import sweep
from smoltrain.checkpoint.saver import Saver

__all__ = [
    "FORMAT",
    "MANIFEST",
    "MODEL_STATES",
    "RANDOM",
    "SAVED",
    "SHARD",
    "WEIGHTS",
    "Manifest",
    "Saver",
    "folder_of",
    "lacking",
    "last_saved",
    "left",
    "newest_valid",
    "read_manifest",
    "restore",
    "steps",
    "strays",
    "sweep",
    "verify",
    "write_manifest",
]
