"""The least time that a device needs for a step of the decoder: each part's operations and bytes over its peaks.

A part takes at least as long as its operations at the peak of matrix products, and as its bytes at the speed of a copy
(Williams et al. 2009, "Roofline"). Bytes are those that must go through memory if all that can be fused is fused.

Legend: n tokens of a micro-batch, k inputs and m outputs of a product, D width, V vocabulary, T length of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from smoltrain.config.schema import ModelSection

PRODUCTS, ATTENTION, ELEMENTWISE, UPDATE = "matrix products", "attention", "elementwise", "gradients and update"
PASSES = 3  # of a product: forward, and in backward the gradients of its input and of its weights
HALF_BYTES = 2  # of an activation or a weight
# Elementwise passes over a vector of width D for each token and block: what is read and written, forward and backward.
NORM_AND_RESIDUAL_PASSES = 26  # two norms, each with the residual before it
ROTARY_PASSES = 4  # over queries and keys
GATED_PASSES = 9  # over the inner width: silu(gate) x up forward reads 2 and writes 1; backward reads 3, writes 3
ATTENTION_SUM_PASSES = 2  # backward, of the output and its gradient
LOGIT_PASSES = 3  # over V: two reads for the softmax and its gradient, one write
ADAMW_BYTES = 30  # a parameter: master, two moments (read and write), fp32 gradient read, bf16 weight written
GRADIENT_SUM_BYTES = 10  # a parameter and micro-batch: bf16 gradient read, fp32 sum read and written


@dataclass(frozen=True)
class RooflinePart:
    """What one kind of work takes in a step."""

    kind: str
    operations: float
    num_bytes: float

    def seconds(self, flops: float, bytes_per_s: float) -> float:
        """At least, on a device of these peaks."""
        return max(self.operations / flops, self.num_bytes / bytes_per_s)


def list_roofline_parts(
    section: ModelSection, micro_batch_tokens: int, accumulation: int, length: int
) -> list[RooflinePart]:
    """Of a step of so many micro-batches, one part for each product and each kind of pass over memory."""
    n = micro_batch_tokens * accumulation
    D, layers = section.hidden_size, section.num_hidden_layers
    inner, V = section.intermediate_size, section.vocab_size
    keys = D // section.num_attention_heads * section.num_key_value_heads
    parameters = V * D + layers * (2 * D * D + 2 * D * keys + 3 * D * inner)
    return [
        _product(micro_batch_tokens, D, D, 2 * layers * accumulation),  # queries, output
        _product(micro_batch_tokens, D, keys, 2 * layers * accumulation),  # keys, values
        _product(micro_batch_tokens, D, inner, 3 * layers * accumulation),  # gate, up, down
        _product(micro_batch_tokens, D, V, accumulation),  # head
        # Two products over the causal half of T x T forward, five backward, as probabilities are not kept (Dao 2023).
        RooflinePart(ATTENTION, (2 + 5) * length * D * n * layers, 0.0),
        _passes(n * layers, D, NORM_AND_RESIDUAL_PASSES + ATTENTION_SUM_PASSES),
        _passes(n * layers, D + keys, ROTARY_PASSES),
        _passes(n * layers, inner, GATED_PASSES),
        _passes(n, V, LOGIT_PASSES),
        RooflinePart(UPDATE, 0.0, parameters * (ADAMW_BYTES + GRADIENT_SUM_BYTES * accumulation)),
    ]


def sum_by_kind(parts: Sequence[RooflinePart], flops: float, bytes_per_s: float) -> dict[str, float]:
    """Seconds of each kind of work, at least, in the order in which they come."""
    seconds: dict[str, float] = {}
    for part in parts:
        seconds[part.kind] = seconds.get(part.kind, 0.0) + part.seconds(flops, bytes_per_s)
    return seconds


def _product(n: int, k: int, m: int, times: int) -> RooflinePart:
    operations = 2 * n * k * m
    num_bytes = HALF_BYTES * (n * k + k * m + n * m)
    return RooflinePart(PRODUCTS, PASSES * times * operations, PASSES * times * num_bytes)


def _passes(num_vectors: int, width: int, passes: int) -> RooflinePart:
    return RooflinePart(ELEMENTWISE, 0.0, HALF_BYTES * num_vectors * width * passes)
