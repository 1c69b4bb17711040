"""What a command read at its start, handed to the ranks of all its phases: files may be edited while a run is on.

Through a pipe that only parent and child hold: what a URL of the data may carry stands on no disk, and a config comes
out as the very values that went in.
"""

import pickle
from typing import BinaryIO

from smoltrain import ds_config
from smoltrain.schema import Config


def pack(settings: Config) -> bytes:
    """The config, and the text of the DeepSpeed config that it names."""
    name = settings.engine.ds_config
    return pickle.dumps((settings, ds_config.text(name)))


def unpack(stream: BinaryIO) -> Config:
    """The inverse; `ds_config.fill` then takes that text."""
    settings, text = pickle.load(stream)
    ds_config.remember(settings.engine.ds_config, text)
    return settings
