"""The language model: a decoder, its attention kernel and its loss."""

from smoltrain.model.attention import Kernel, choose
from smoltrain.model.decoder import Decoder, build, parameter_count
from smoltrain.model.layers import KVCache
from smoltrain.model.loss import IGNORED

__all__ = ["IGNORED", "Decoder", "KVCache", "Kernel", "build", "choose", "parameter_count"]
