"""The decoder of a given number of parameters: width, depth, heads and MLP in the proportions of published models.

Legend: D width, L blocks, I width inside the MLP, V vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

MIN_PARAMETERS, MAX_PARAMETERS = 1_000_000, 20_000_000_000

# Parameters -> D / L of published models, between which it is interpolated; below and above it is held. The loss
# depends on it but weakly (Kaplan et al. 2020); below a billion deep and thin is better (MobileLLM, Liu et al. 2024).
PUBLISHED_ASPECTS = (
    (134_515_008, 576 / 30),  # SmolLM2-135M
    (361_821_120, 960 / 32),  # SmolLM2-360M
    (1_235_814_400, 2048 / 16),  # Llama 3.2 1B
    (3_212_749_824, 3072 / 28),  # Llama 3.2 3B
)
INNER_RATIO = 8 / 3  # I / D: three matrices of the cost of two 4 D wide (Shazeer 2020), as in SmolLM2-135M and 360M
INNER_RATIOS = (2.0, 4.0)  # how far I / D may go to meet the number of parameters; Llama 3.2 1B has 4
MULTIPLE = 64  # of I and V: what the matrix units of GPUs like
SMALL_HEAD, LARGE_HEAD = 64, 128  # width of a head, as in SmolLM2 and Llama 3.2 1B; as in Llama 3.2 3B
LARGE_HEAD_FROM = 2_000_000_000  # parameters
UNTIED_FROM = 3_500_000_000  # SmolLM2-135M and 360M, Llama 3.2 1B and 3B are tied; Llama 3.1 8B is not
QUERIES_PER_KEY = (3, 4, 2)  # heads that share keys and values (GQA): SmolLM2 has 3, Llama 3.2 has 4 (1B) and 3 (3B)
TABLE_SHARE = 49_152 * 576 / 134_515_008  # of all parameters, the token table of SmolLM2-135M

TOLERANCE = 0.03  # of the number of parameters
ERROR_WEIGHT = 10.0  # of the relative error of that number, against proportions off by a factor of e


@dataclass(frozen=True)
class DecoderShape:
    """The numbers of a Llama-shaped decoder; their names are those of the recipe's section `model`."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    tie_word_embeddings: bool

    @property
    def num_table_parameters(self) -> int:
        """Those of the token table, and of the head where it has its own."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    @property
    def num_parameters(self) -> int:
        """All of them."""
        D = self.hidden_size
        keys = D // self.num_attention_heads * self.num_key_value_heads
        block = 2 * D * D + 2 * D * keys + 3 * D * self.intermediate_size + 2 * D  # q and o, k and v, MLP, norms
        return self.num_table_parameters + self.num_hidden_layers * block + D


def choose_decoder_shape(num_parameters: int, vocab_size: int) -> DecoderShape:
    """Of the shapes within TOLERANCE of the number, the nearest to the published proportions.

    Of the smallest models there may be none; then it is the one nearest to the number. `num_parameters` is from
    MIN_PARAMETERS to MAX_PARAMETERS, `vocab_size` at most about what `largest_table` says.
    """
    candidates = list(_list_candidates(num_parameters, vocab_size))
    errors = [abs(shape.num_parameters / num_parameters - 1) for shape in candidates]
    tolerated = max(TOLERANCE, min(errors))
    fitting = [shape for shape, error in zip(candidates, errors, strict=True) if error <= tolerated]
    return min(fitting, key=lambda shape: _distance_from_published(shape, num_parameters))


def largest_table(num_parameters: int) -> int:
    """Rows of the token table that take TABLE_SHARE of the parameters, at the published proportions."""
    blocks = (1 - TABLE_SHARE) * num_parameters
    # A block with three queries per key and I = 8/3 D has (2 + 2/3 + 8) D^2 parameters, and L = D / aspect.
    width = (blocks * published_aspect(num_parameters) / (2 + 2 / 3 + 3 * INNER_RATIO)) ** (1 / 3)
    return int(TABLE_SHARE * num_parameters / width)


def published_aspect(num_parameters: int) -> float:
    """D / L, interpolated in the logarithms of both."""
    sizes = [math.log(size) for size, _ in PUBLISHED_ASPECTS]
    aspects = [math.log(aspect) for _, aspect in PUBLISHED_ASPECTS]
    size = min(max(math.log(num_parameters), sizes[0]), sizes[-1])
    above = max(1, next(i for i, known in enumerate(sizes) if known >= size))
    share = (size - sizes[above - 1]) / (sizes[above] - sizes[above - 1])
    return math.exp(aspects[above - 1] + share * (aspects[above] - aspects[above - 1]))


def _list_candidates(num_parameters: int, vocab_size: int) -> Iterator[DecoderShape]:
    """For each width and depth near the published proportions the MLP that meets the number best."""
    head = SMALL_HEAD if num_parameters < LARGE_HEAD_FROM else LARGE_HEAD
    tied = num_parameters < UNTIED_FROM
    aspect = published_aspect(num_parameters)
    guess = (num_parameters * aspect / 10) ** (1 / 3)  # of D: blocks of about 10 D^2, all parameters in them
    for heads in range(1, math.ceil(2.5 * guess / head) + 1):
        D = heads * head
        depths = range(max(2, math.ceil(D / aspect / 3)), math.floor(3 * D / aspect) + 1)
        for L in depths:
            without = DecoderShape(vocab_size, D, L, heads, _count_key_heads(heads), 0, tied)
            wanted = (num_parameters - without.num_parameters) / (3 * D * L)
            inner = max(MULTIPLE, MULTIPLE * round(wanted / MULTIPLE))
            if INNER_RATIOS[0] <= inner / D <= INNER_RATIOS[1]:
                yield DecoderShape(vocab_size, D, L, heads, without.num_key_value_heads, inner, tied)


def _count_key_heads(heads: int) -> int:
    """Key and value heads: as few as QUERIES_PER_KEY, tried in its order, divides; each head its own if none does."""
    return next((heads // shared for shared in QUERIES_PER_KEY if heads % shared == 0), heads)


def _distance_from_published(shape: DecoderShape, num_parameters: int) -> float:
    aspect = shape.hidden_size / shape.num_hidden_layers / published_aspect(num_parameters)
    inner = shape.intermediate_size / shape.hidden_size / INNER_RATIO
    shared = shape.num_attention_heads / shape.num_key_value_heads / QUERIES_PER_KEY[0]
    error = shape.num_parameters / num_parameters - 1
    return sum(abs(math.log(ratio)) for ratio in (aspect, inner, shared)) + ERROR_WEIGHT * abs(error)
