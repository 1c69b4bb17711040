"""What can be known before the first step: what is wrong, so that nothing is tokenised for a run that could not start,
and what the plan asks of its data, its model and its ranks, in numbers that somebody may want to change.
"""

from typing import NamedTuple

import torch

from smoltrain.config.load import cut_micro_batch
from smoltrain.config.schema import Config
from smoltrain.data.tokens.check_fit import check_tokenizer_fits
from smoltrain.data.tokens.prepared import PreparedData, UnusedRows
from smoltrain.engine.deepspeed_json import fill_deepspeed_config
from smoltrain.engine.reduction import check_reduction
from smoltrain.estimate.horizon import count_epoch_tokens, format_count
from smoltrain.run.guarded_sink import check_sinks
from smoltrain.run.run_folder import accumulation_steps
from smoltrain.schedule import Plan
from smoltrain.training.resolve_auto import build_weightless_model, choose_computing
from smoltrain.training.run_tasks import check_run_tasks

# Up to here repeated tokens lower the loss about as new ones do, beyond it less and less: Muennighoff et al. 2023.
EPOCHS_TO_WARN = 4
COMPUTE_OPTIMAL_TOKENS = 20  # per parameter: Hoffmann et al. 2022, table 3


class PreflightLine(NamedTuple):
    """A fact about a plan: what it is about, and the numbers with the key that changes them."""

    what: str
    text: str
    warns: bool = False


def check_recipe(config: Config) -> None:
    """Check what would be wrong on any machine, without the network. Errors: UserError."""
    precision = config.engine.precision
    known = None if precision == "auto" else precision
    fill_deepspeed_config(config, precision=known, accumulation=config.batch.accumulation, world_size=None)
    build_weightless_model(config)
    check_tokenizer_fits(config)


def check_start(config: Config, device: torch.device, num_ranks: int, rows_per_step: int) -> None:
    """Check what would be wrong here: sinks, tasks, precision, kernels, the model's class, DeepSpeed's config.

    Errors: UserError.
    """
    check_tokenizer_fits(config)
    check_sinks(config)
    check_run_tasks(config)
    config = cut_micro_batch(config, rows_per_step, num_ranks)
    accumulation = accumulation_steps(config, rows_per_step, num_ranks)
    chosen = choose_computing(config, device, rows_per_step)
    tree = fill_deepspeed_config(config, precision=chosen.precision, accumulation=accumulation, world_size=num_ranks)
    check_reduction(tree, config.engine.reduce_gradients)


def describe_preflight(
    config: Config, prepared: PreparedData, num_parameters: int, rows_per_step: int
) -> list[PreflightLine]:
    """What a plan means for its data, its model, its vocabulary and its learning rate. Reads all tokens once."""
    plan = Plan(config.phases)
    tokens = plan.last_step * rows_per_step * config.batch.sequence_length
    key = " or ".join(f"phases.{phase.name}.tokens" for phase in plan.phases)
    epoch_tokens = count_epoch_tokens(prepared.index, config.batch.sequence_length)
    lines = []
    if epoch_tokens is not None:
        lines.append(describe_epochs(tokens, epoch_tokens, key))
    lines.append(describe_tokens_per_parameter(tokens, num_parameters, key))
    vocab_size = config.model.vocab_size
    unused = prepared.count_unused_rows(vocab_size)
    lines.append(describe_vocabulary(vocab_size, prepared.tokenizer.num_ids, unused))
    lines.append(describe_learning_rate(config, rows_per_step))
    return lines


def describe_epochs(tokens: int, epoch_tokens: int, key: str) -> PreflightLine:
    """How often the plan reads its data."""
    epochs = tokens / epoch_tokens
    if epochs <= EPOCHS_TO_WARN:
        text = f"{epochs:.3g}, as {format_count(tokens)} tokens of {epoch_tokens:,}; {key} change it"
        return PreflightLine("epochs", text)
    text = (
        f"the plan's {format_count(tokens)} tokens are {epochs:,.1f} epochs of {epoch_tokens:,} training tokens; "
        f"beyond {EPOCHS_TO_WARN} a token that is read again is worth less than a new one (Muennighoff et al. 2023): "
        f"take more data, or lower {key}"
    )
    return PreflightLine("epochs", text, warns=True)


def describe_tokens_per_parameter(tokens: int, num_parameters: int, key: str) -> PreflightLine:
    """How much the plan trains for the size of its model."""
    ratio, size = f"{tokens / num_parameters:.3g}", f"{format_count(num_parameters)} parameters"
    text = (
        f"{ratio}, as {format_count(tokens)} tokens for {size}; "
        f"compute-optimal are about {COMPUTE_OPTIMAL_TOKENS} (Hoffmann et al. 2022); {key} change it"
    )
    return PreflightLine("tokens per parameter", text)


def describe_vocabulary(vocab_size: int, num_ids: int, unused: UnusedRows | None) -> PreflightLine:
    """Rows of the embedding table that are of no use; `unused` are those that no training token reads, if known."""
    beyond = vocab_size - num_ids
    facts = [f"{beyond:,} beyond the tokenizer's {num_ids:,} ids"] if beyond else []
    if unused is not None and unused.num_spare > beyond:
        facts.append(f"{unused.num_spare - beyond:,} of ids that the training tokens never have")
    bytes_text = ""
    if unused is not None and unused.num_bytes:
        bytes_text = f"; {unused.num_bytes:,} are single bytes that the text lacks, there so that any text has ids"
    if facts:
        text = f"{vocab_size:,} rows, {' and '.join(facts)}; a smaller vocabulary is model.vocab_size with a tokenizer"
        return PreflightLine("vocabulary", f"{text} of as few ids{bytes_text}")
    known = ", all of them of ids that the training tokens have" if unused is not None and not bytes_text else ""
    return PreflightLine("vocabulary", f"{vocab_size:,} rows, as many as ids{known}{bytes_text}; model.vocab_size")


def describe_learning_rate(config: Config, rows_per_step: int) -> PreflightLine:
    """How many rows over all ranks the peak is for: those of batch.accumulation multiply with the ranks.

    Which rate is best depends on the rows of a step: McCandlish et al. 2018.
    """
    peak = max(phase.lr for phase in config.phases if phase.lr is not None)
    text = f"{peak:g} at most, for {rows_per_step:,} rows a step"
    if config.batch.rows_per_step is not None:
        return PreflightLine("learning rate", f"{text} on any number of ranks, as batch.rows_per_step says")
    of_one_rank = config.batch.rows(1)
    advice = f"batch.rows_per_step={of_one_rank} keeps those of one rank on any number of them"
    if rows_per_step == of_one_rank:
        return PreflightLine("learning rate", f"{text}; they multiply with the ranks: {advice}")
    factor = rows_per_step / of_one_rank
    return PreflightLine("learning rate", f"{text}, {factor:g} times those of one rank; {advice}")
