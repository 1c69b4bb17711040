"""Does what was, or is to be, prepared fit the run: the ids the model, the rows a step, the streams the ranks?"""

from smoltrain.config.schema import Config
from smoltrain.data.tokenizers import by_name
from smoltrain.data.tokenizers.by_name import is_tokenizer_folder
from smoltrain.data.tokens.index import DataIndex
from smoltrain.data.tokens.packing import count_rows
from smoltrain.errors import Problem, UserError


def check_tokenizer_fits(config: Config) -> None:
    """Errors: UserError for a tokenizer whose ids the model has no room for, if it lies in a folder of this machine."""
    section = config.tokenizer
    if section.name != "bpe" and is_tokenizer_folder(section.name):
        check_vocab_size(by_name.load_named_tokenizer(section).num_ids, config)


def check_vocab_size(num_ids: int, config: Config) -> None:
    """Errors: UserError if the model has fewer rows in its table."""
    vocab_size = config.model.vocab_size
    if num_ids > vocab_size:
        what, want = "the tokenizer has more ids than the model", f"at most model.vocab_size = {vocab_size:,}"
        raise UserError(Problem(what, f"{num_ids:,}", want, "model.vocab_size or tokenizer"))


def check_enough_rows(index: DataIndex, config: Config, rows_per_step: int) -> None:
    """Errors: UserError unless each source has a row to train on and one to validate on, and one alone a whole step."""
    length, problems = config.batch.sequence_length, []
    for name, source in index.sources.items():
        of = f" of {name}" if len(index.sources) > 1 else ""
        least = 1 if of else rows_per_step
        num_tokens = source.train.tokens if source.train else 0
        if index.mode == "cached" and num_tokens < least * length + 1:
            problems.append(
                Problem(
                    what=f"the training data{of} are too few",
                    saw=f"{count_rows(num_tokens, length):,} rows of {length} targets ({num_tokens:,} tokens)",
                    want=f"at least one of {length} targets" if of else f"at least one step's {least:,} rows",
                    change="data, batch.sequence_length or batch",
                )
            )
        num_held_out = source.validation.tokens
        if num_held_out < length + 1:
            change = f"data.validation_share = {config.data.validation_share}"
            if source.held_out.startswith("validation_"):
                change = f"data.{source.held_out}"
            want = f"at least one row of {length} targets"
            problems.append(Problem(f"the validation data{of} are too few", f"{num_held_out:,} tokens", want, change))
    if problems:
        raise UserError(*problems)


def check_stream_count(config: Config, num_streams: int, rows_per_step: int, world_size: int) -> None:
    """Errors: UserError if the rows of a step, or the ranks, do not fit the virtual streams."""
    requested = config.data.streams
    if requested not in (None, num_streams):
        want = f"{num_streams}, as chosen at its first start"
        raise UserError(Problem("the run has another number of streams", str(requested), want, "data.streams"))
    if rows_per_step % num_streams:
        what, want = "the streams do not divide the rows of a step", f"a divisor of {rows_per_step}"
        raise UserError(Problem(what, f"{num_streams} streams", want, "data.streams or batch"))
    if num_streams % world_size:
        fits = [str(n) for n in range(1, num_streams + 1) if num_streams % n == 0]
        what, want = f"the ranks do not divide the {num_streams} streams", f"one of {', '.join(fits)} ranks"
        raise UserError(Problem(what, f"{world_size} ranks", want, "the number of ranks, or data.streams"))
