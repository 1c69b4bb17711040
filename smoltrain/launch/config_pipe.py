"""What a command read at its start, handed to the ranks of all its phases: files may be edited while a run is on.

Through a pipe that only parent and child hold: what a URL of the data may carry stands on no disk, and a config comes
out as the very values that went in.
"""

import pickle
from typing import BinaryIO

from smoltrain.config.schema import Config
from smoltrain.engine.deepspeed_json import read_deepspeed_text, remember_deepspeed_text

CONFIG_ON_STDIN = "--config-on-stdin"  # the first word of a rank; the others then only say in `ps` what runs


def pack_config(settings: Config) -> bytes:
    """The config, and the text of the DeepSpeed config that it names."""
    name = settings.engine.ds_config
    return pickle.dumps((settings, read_deepspeed_text(name)))


def unpack_config(stream: BinaryIO) -> Config:
    """The inverse; `ds_config.fill` then takes that text."""
    settings, text = pickle.load(stream)
    remember_deepspeed_text(settings.engine.ds_config, text)
    return settings
