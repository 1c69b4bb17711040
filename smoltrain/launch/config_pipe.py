"""What a command has read and worked out, handed to the ranks of a phase: files may be edited while a run is on.

Through a pipe that only parent and child hold: what a URL of the data may carry stands on no disk, and a config comes
out as the very values that went in. With the config goes all that the supervisor has found out for the start.
"""

import pickle
from typing import BinaryIO

from smoltrain.engine.deepspeed_json import read_deepspeed_text, remember_deepspeed_text
from smoltrain.training.start import Start


def pack_start(start: Start) -> bytes:
    """The start, and the text of the DeepSpeed config that its recipe names."""
    return pickle.dumps((start, read_deepspeed_text(start.config.engine.ds_config)))


def unpack_start(stream: BinaryIO) -> Start:
    """The inverse. `fill_deepspeed_config` then takes that text."""
    start, text = pickle.load(stream)
    remember_deepspeed_text(start.config.engine.ds_config, text)
    return start
