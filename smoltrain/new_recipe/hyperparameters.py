"""Tokens, batch, learning rate and cadences of a plan, by published rules: pure functions of sizes and counts.

Legend: N parameters without the token table, D tokens of the plan, B tokens of a step, T tokens of a row.
"""

import math
from dataclasses import dataclass

from smoltrain.errors import Problem, UserError
from smoltrain.new_recipe.quantities import round_down_to_power_of_two, round_to_digits

TOKENS_PER_PARAMETER = 20  # compute-optimal, of all parameters (Hoffmann et al. 2022)
MAX_EPOCHS = 4  # up to which a text that is read again is about as good as new text (Muennighoff et al. 2023)

# Step Law (Li et al. 2025, arXiv 2503.04715): the optimum of 3,700 runs, with a cosine that ends at FINAL_RATE.
STEP_LAW_RATE = (1.79, -0.713, 0.307)  # learning rate: factor, power of N, power of D
STEP_LAW_BATCH = (0.58, 0.571)  # B: factor, power of D
FINAL_RATE = 1e-5
HIGHEST_RATE = 3e-3  # SmolLM-135M's, in a public config; the law's models were not as small as what would get more

BETA1, BETA2, CLIPPING = 0.9, 0.95, 1.0  # SmolLM-135M, Pythia
WEIGHT_DECAY = 0.1  # Pythia
WARMUP_SHARE = 0.01  # of the steps: Pythia
LEAST_WARMUP = round(2 / (1 - BETA2))  # steps: what Adam needs (Ma & Yarats 2021)
MOST_WARMUP = 2000  # steps: SmolLM-135M
LARGEST_WARMUP_SHARE = 0.1  # of a short plan

LONGEST_ROW = 2048  # T of SmolLM-135M and Pythia; smaller models take shorter rows
ROW_LENGTHS = ((5_000_000, 256), (50_000_000, 512), (100_000_000, 1024))  # parameters below which T is at most that
SHORT_ROW = 128  # of a short plan: it has fewer rows a step rather than shorter ones
SHORTEST_ROW = 32  # of a short text
LEAST_ROWS = 8  # of a step: down to SHORT_ROW rows get shorter before they get fewer
LEAST_STEPS_PER_EPOCH = 4

NUM_EVALUATIONS, NUM_SAMPLES, NUM_CHECKPOINTS, NUM_LINES = 20, 10, 10, 50
MOST_STEPS_BETWEEN_CHECKPOINTS = 1000
EVALUATION_SHARE = 0.02  # of the time of the steps, for all evaluations; a forward pass is a third of a step
EVALUATION_ROWS = (8, 512)  # at least and at most


@dataclass(frozen=True)
class BatchPlan:
    """Rows of a step, and how many steps."""

    sequence_length: int
    rows_per_step: int
    steps: int

    @property
    def step_tokens(self) -> int:
        """Tokens of a step, over all ranks."""
        return self.sequence_length * self.rows_per_step

    @property
    def tokens(self) -> int:
        """Tokens of the whole plan, repeated ones too."""
        return self.step_tokens * self.steps


@dataclass(frozen=True)
class Cadences:
    """Steps between two of each, and the rows of an evaluation."""

    evaluate: int
    evaluate_rows: int
    sample: int
    checkpoint: int
    print: int


def optimal_num_tokens(num_parameters: int, text_tokens: float) -> int:
    """D without another wish: compute-optimal, and of a short text MAX_EPOCHS."""
    return int(min(TOKENS_PER_PARAMETER * num_parameters, MAX_EPOCHS * text_tokens))


def step_law_batch(num_tokens: float) -> float:
    """B."""
    factor, power = STEP_LAW_BATCH
    return factor * num_tokens**power


def choose_learning_rate(num_block_parameters: int, num_tokens: float) -> float:
    """The peak of a plan, in two digits; never above HIGHEST_RATE."""
    factor, power_of_n, power_of_d = STEP_LAW_RATE
    rate = factor * num_block_parameters**power_of_n * num_tokens**power_of_d
    return round_to_digits(min(rate, HIGHEST_RATE), 2)


def choose_final_rate(peak: float) -> float:
    """Where the cosine ends: FINAL_RATE, and of a low peak a tenth of it."""
    return min(FINAL_RATE, round_to_digits(peak / 10, 2))


def plan_batch(num_parameters: int, num_tokens: float, text_tokens: float, world: int) -> BatchPlan:
    """B by the Step Law, cut into rows that `world` ranks share evenly, and where it can be 2, 4 or 8 of them too.

    Of a short text a step takes at most a LEAST_STEPS_PER_EPOCH-th.
    Errors: UserError for a text without a row for each rank, and where not even the fewest rows fit the tokens.
    """
    step_tokens = min(step_law_batch(num_tokens), text_tokens / LEAST_STEPS_PER_EPOCH)
    length = next((length for size, length in ROW_LENGTHS if num_parameters < size), LONGEST_ROW)
    shortest = min(SHORT_ROW, text_tokens / LEAST_STEPS_PER_EPOCH / math.lcm(world, 2))
    longest = max(SHORTEST_ROW, shortest, step_tokens / max(LEAST_ROWS, world))
    length = min(length, round_down_to_power_of_two(longest))
    multiples = [math.lcm(world, ranks) for ranks in (8, 4, 2)]
    multiple = next((multiple for multiple in multiples if multiple * length <= step_tokens), multiples[-1])
    rows = multiple * max(1, round(step_tokens / (multiple * length)))
    if rows * length >= text_tokens:
        saw, want = f"about {text_tokens:,.0f} tokens", f"at least the {rows * length:,} of a step on {world} ranks"
        raise UserError(Problem("the text is too short to train on", saw, want, "--data or --world"))
    steps = round(num_tokens / (rows * length))
    if steps < 1:
        saw, want = f"{num_tokens:,.0f} tokens", f"at least the {rows * length:,} of a step on {world} ranks"
        raise UserError(Problem("the plan is too short for a step", saw, want, "--tokens, --hours or --world"))
    return BatchPlan(length, rows, steps)


def choose_warmup(steps: int) -> int:
    """Steps of linear warm-up."""
    wanted = min(max(LEAST_WARMUP, round(WARMUP_SHARE * steps)), MOST_WARMUP)
    return min(wanted, int(LARGEST_WARMUP_SHARE * steps))


def choose_cadences(batch: BatchPlan, held_out_rows: float) -> Cadences:
    """So many of each in the plan, at round numbers of steps, whatever its length."""
    affordable = 3 * EVALUATION_SHARE * batch.steps * batch.rows_per_step / NUM_EVALUATIONS
    least, most = EVALUATION_ROWS
    rows = round_down_to_power_of_two(min(max(affordable, least), most, max(1, held_out_rows)))
    return Cadences(
        evaluate=_round_cadence(batch.steps / NUM_EVALUATIONS),
        evaluate_rows=rows,
        sample=_round_cadence(batch.steps / NUM_SAMPLES),
        checkpoint=_round_cadence(min(batch.steps / NUM_CHECKPOINTS, MOST_STEPS_BETWEEN_CHECKPOINTS)),
        print=_round_cadence(min(batch.steps / NUM_LINES, 10)),
    )


def _round_cadence(steps: float) -> int:
    """The nearest of 1, 2, 5, 10, 20, 50, ..., by its ratio."""
    power = 10 ** int(math.log10(max(1, steps)))
    return min((digit * power for digit in (1, 2, 5, 10)), key=lambda every: abs(math.log(every / steps)))
