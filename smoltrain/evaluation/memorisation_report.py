"""`smoltrain memorisation`: what a run's model copies, at any of its checkpoints, in one process."""

from collections.abc import Callable

from smoltrain.config.schema import Config
from smoltrain.data.tokens.load_prepared import load_prepared_data
from smoltrain.data.tokens.prepared import PreparedData
from smoltrain.errors import Problem, UserError
from smoltrain.evaluation.memorisation import KIND_NAMES, Memorisation, MemorisationProbe, find_reason_unknown
from smoltrain.inference.device import move_to_best_device
from smoltrain.inference.draw_texts import draw_texts
from smoltrain.inference.load import load_trained_model


def describe_run_memorisation(
    source: str, step: int | None, num_texts: int, say: Callable[[str], None] = lambda _: None
) -> str:
    """What a run's model copies, in some lines; `say` tells where it computes.

    Errors: UserError for a run whose training tokens nobody has, and those of `load_trained_model`.
    """
    loaded = load_trained_model(source, step)
    if loaded.config is None:
        want = "a run, whose training tokens are known"
        raise UserError(Problem("nobody knows what this model was trained on", str(source), want, "the RUN argument"))
    config = loaded.config
    prepared = _load_run_tokens(config)
    weights = [part.weight for part in config.data.parts]
    probe = MemorisationProbe(prepared, weights, num_texts, config.batch.sequence_length)
    if reason := move_to_best_device(loaded.model).reason:
        say(reason)
    texts = draw_texts(
        loaded.model, probe.prompts, probe.num_new_tokens, stop_ids=loaded.stop_ids, banned_ids=loaded.banned_ids,
        seed=loaded.seed,
    )  # fmt: skip
    probe.take_texts(texts)
    head = (
        f"{loaded.folder} at step {loaded.step}: {len(texts)} texts of at most {probe.num_new_tokens} tokens, drawn at "
        f"temperature 1 after prompts of {probe.prompts.shape[1]}"
    )
    searched = f"looked for in all {sum(map(len, prepared.train)):,} training tokens"
    return "\n".join([head, *_format_table(probe.count(probe.search())), searched])


def _load_run_tokens(config: Config) -> PreparedData:
    """The tokens of a run. Errors: UserError if they are streamed, or away."""
    prepared = load_prepared_data(config)
    reason = find_reason_unknown(prepared)
    if reason:
        want = "a run that keeps its tokens, as data.mode=cached and `smoltrain prepare data` do"
        raise UserError(Problem("nobody can say what the model copies", reason.partition("; ")[0], want, "data.mode"))
    return prepared


def _format_table(found: Memorisation) -> list[str]:
    """A line for each length, a column for each kind of text."""
    names = (f"{KIND_NAMES[kind]:>24}" for kind in found.counts)
    lines = [f"{'':8}{''.join(names)}"]
    for counts in zip(*found.counts.values(), strict=True):
        cells = ("no text so long" if c.share is None else f"{c.share:.1%} of {c.num_ngrams:,}" for c in counts)
        lines.append(f"{counts[0].length}-grams{''.join(f'{cell:>24}' for cell in cells)}")
    return lines
