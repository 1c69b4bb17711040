"""The language model: two kinds behind one interface, the attention kernel and the loss."""

from smoltrain.model.attention import Kernel, choose
from smoltrain.model.decoder import Decoder
from smoltrain.model.interface import Computing, LanguageModel
from smoltrain.model.kinds import attention_dropout, build, head_width, parameter_count
from smoltrain.model.layers import KVCache
from smoltrain.model.loss import IGNORED
from smoltrain.model.transformers_model import HuggingFaceModel

__all__ = [
    "IGNORED",
    "Computing",
    "Decoder",
    "HuggingFaceModel",
    "KVCache",
    "Kernel",
    "LanguageModel",
    "attention_dropout",
    "build",
    "choose",
    "head_width",
    "parameter_count",
]
