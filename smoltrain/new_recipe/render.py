"""A plan as the text of a recipe: each value below a comment that says what it came from."""

import textwrap
from typing import Any, NamedTuple

from smoltrain.config.schema import DataSection
from smoltrain.config.yaml_text import dump_yaml
from smoltrain.estimate.horizon import format_count
from smoltrain.new_recipe import hyperparameters as rules
from smoltrain.new_recipe import shape as shapes
from smoltrain.new_recipe.plan import RecipePlan
from smoltrain.new_recipe.quantities import format_ratio
from smoltrain.new_recipe.text import SEEN_PER_ID
from smoltrain.new_recipe.wish import RecipeWish

WIDTH = 100  # columns of a line
SECTION_INDENT = "  "


class Entry(NamedTuple):
    """A key of the recipe, its value, and what it came from; '' where the key says it."""

    key: str
    value: Any
    source: str


def render_recipe(plan: RecipePlan) -> str:
    """The text of NAME.yaml. Equal plans give equal texts."""
    sections = {
        "model": _model_entries(plan),
        "tokenizer": _tokenizer_entries(plan),
        "data": _data_entries(plan),
        "batch": _batch_entries(plan),
        "engine": _engine_entries(),
        "optimizer": _optimizer_entries(),
        "phases": _phase_entries(plan),
        "evaluate": _evaluate_entries(plan),
        "generation": _generation_entries(plan),
        "sample": _sample_entries(plan),
        "checkpoint": _checkpoint_entries(plan),
        "track": [
            Entry(
                "print_every",
                plan.cadences.print,
                f"steps: about {rules.NUM_LINES} lines of a short plan, every ten steps of a long one",
            )
        ],
    }
    lines = _head_lines(plan)
    for name, entries in sections.items():
        lines += [f"{name}:", *_render_entries(entries, is_item=name == "phases")]
    return "\n".join(lines) + "\n"


def _head_lines(plan: RecipePlan) -> list[str]:
    wish, shape, batch = plan.wish, plan.text.shape, plan.batch
    error = shape.num_parameters / wish.num_parameters - 1
    where = _name_text(wish)
    return [
        f"# {wish.name}: {format_count(shape.num_parameters)} parameters, {format_count(batch.tokens)} tokens "
        f"of {where}; written by `smoltrain new`.",
        f"# Command:        ./train.sh {wish.name}.yaml             (or: smoltrain train {wish.name}.yaml)",
        f"# Parameters:     {shape.num_parameters:,} exactly, {error:+.1%} of the {wish.num_parameters:,} asked for; "
        f"{shape.num_table_parameters:,} of them in the token table",
        f"# Plan:           {batch.steps:,} steps of {batch.step_tokens:,} tokens = {batch.tokens:,} tokens: "
        f"{format_ratio(plan.tokens_per_parameter)} a parameter, {format_ratio(plan.epochs)} epochs",
        f"# Expected time:  not measured; smoltrain estimate {wish.name}.yaml --device {wish.device} "
        f"--world {wish.world}",
        "# Expected loss:  not measured. Nothing was tuned on this text: the rules that stand beside the values are",
        "# starting points. What is not written here is the default: smoltrain show prints every value.",
    ]


def _name_text(wish: RecipeWish) -> str:
    if wish.data.hub is not None:
        return f"the Hub's {wish.data.hub}"
    return "a text of your own" if wish.has_own_text else "the plays of Shakespeare"


def _model_entries(plan: RecipePlan) -> list[Entry]:
    shape, batch = plan.text.shape, plan.batch
    D, L, heads, keys = (
        shape.hidden_size, shape.num_hidden_layers, shape.num_attention_heads, shape.num_key_value_heads
    )  # fmt: skip
    aspect = shapes.published_aspect(plan.wish.num_parameters)
    return [
        Entry("vocab_size", shape.vocab_size, "every id of the tokenizer below, and no row more"),
        Entry(
            "hidden_size", D,
            f"width / depth = {D / L:.3g}; interpolated between SmolLM2-135M (19.2), SmolLM2-360M (30), Llama 3.2 1B "
            f"(128) and 3B (110) it would be {aspect:.3g} at this size. The loss depends on it weakly (Kaplan et al. "
            "2020); below a billion, deep and thin is better (MobileLLM, Liu et al. 2024)",
        ),
        Entry("num_hidden_layers", L, ""),
        Entry("num_attention_heads", heads, f"{D // heads} wide each, as in {_head_model(D // heads)}"),
        Entry("num_key_value_heads", keys, _describe_key_heads(heads // keys)),
        Entry(
            "intermediate_size", shape.intermediate_size,
            f"SwiGLU, {shape.intermediate_size / D:.3g} x the width: the multiple of {shapes.MULTIPLE} that gives the "
            "parameters asked for, near 8/3 (Shazeer 2020; SmolLM2-135M and 360M), at most 4 (Llama 3.2 1B)",
        ),
        Entry("max_position_embeddings", batch.sequence_length, "positions are trained as far as the rows below reach"),
        Entry(
            "tie_word_embeddings", shape.tie_word_embeddings,
            "the head is the token table, as in SmolLM2 and Llama 3.2 1B and 3B" if shape.tie_word_embeddings else
            "the head has a table of its own, as in Llama 3.1 8B",
        ),
    ]  # fmt: skip


def _head_model(width: int) -> str:
    return "SmolLM2 and Llama 3.2 1B" if width == shapes.SMALL_HEAD else "Llama 3.2 3B"


def _describe_key_heads(shared: int) -> str:
    like = {3: ", as in SmolLM2-135M and 360M", 4: ", as in Llama 3.2 1B"}.get(shared, "")
    if shared == 1:
        return "each query head has its own: their number has no divisor of 2, 3 or 4 to share by"
    return f"{shared} query heads share one (GQA){like}"


def _tokenizer_entries(plan: RecipePlan) -> list[Entry]:
    vocabulary = plan.text.vocabulary
    reasons = {
        "the text": (
            f"the most that the text can teach: a rare id stands {SEEN_PER_ID} times in it (the rule of Gowda & May "
            "2020, on the assumption of Zipf's law)"
        ),
        "the model": "the token table takes about the share of the parameters that SmolLM2-135M's takes (21 %)",
        "SmolLM2's": "that of SmolLM2; a larger table would take memory that small models need elsewhere",
        "all that the text gives": "the text is so short that no more pairs of it can be merged",
    }
    return [
        Entry("name", "bpe", "a byte-level BPE, trained on this very text at the first start; needs no network"),
        Entry(
            "vocab_size", vocabulary.size,
            f"{reasons[vocabulary.reason]}. About {vocabulary.bytes_per_token:.3g} bytes a token",
        ),
    ]  # fmt: skip


def _data_entries(plan: RecipePlan) -> list[Entry]:
    text, sample = plan.text, plan.text.sample
    amount = (
        f"{'' if sample.is_whole else 'about '}{text.vocabulary.text_tokens:,.0f} tokens in {sample.num_files:,} "
        f"file{'s' * (sample.num_files > 1)}"
    )
    entries = _source_entries(plan.wish, amount)
    if sample.parts_documents:
        entries.append(Entry("documents", "separator", "the separator stands in the files, so it parts documents"))
    if sample.needs_cached_mode:
        few = "each file is one document, and they are too few to be streamed"
        why = "so little text is tokenised before the first step" if sample.is_whole else few
        entries.append(Entry("mode", "cached", why))
    held_out = f"about {text.held_out_tokens:,.0f} tokens to validate on"
    if text.validation_share is None:
        entries.append(_own_validation_entry(plan.wish.data, held_out))
    else:
        entries.append(Entry("validation_share", text.validation_share, f"of the documents, held out: {held_out}"))
    return entries


def _source_entries(wish: RecipeWish, amount: str) -> list[Entry]:
    data = wish.data
    if not wish.has_own_text:
        return [
            Entry("package", data.package, f"the plays of Shakespeare, as no --data was given: {amount}"),
            Entry("pattern", data.pattern, ""),
        ]
    if data.hub is not None:
        entries = [Entry("hub", data.hub, f"as given with --hub: {amount}")]
    else:
        entries = [
            Entry("path", data.path, f"as given with --data, from the root so that any folder will do: {amount}")
        ]
    if data.hub_config is not None:
        entries.append(Entry("hub_config", data.hub_config, "as given with --hub-config"))
    if "text_field" in data.model_fields_set:
        entries.append(Entry("text_field", data.text_field, "as given with --text-field"))
    return entries


def _own_validation_entry(data: DataSection, held_out: str) -> Entry:
    if data.validation_split is not None:
        return Entry("validation_split", data.validation_split, f"as given with --validation: {held_out}")
    return Entry("validation_path", data.validation_path, f"as given with --validation, from the root: {held_out}")


def _batch_entries(plan: RecipePlan) -> list[Entry]:
    batch = plan.batch
    wanted = rules.step_law_batch(batch.tokens)
    return [
        Entry(
            "sequence_length", batch.sequence_length,
            f"tokens; {rules.LONGEST_ROW:,} as in SmolLM-135M and Pythia, less for smaller models, and down to "
            f"{rules.SHORT_ROW} for steps that would have fewer than {rules.LEAST_ROWS} rows (the shortest texts: "
            f"{rules.SHORTEST_ROW})",
        ),
        Entry("micro_batch", "auto", "as many rows at once as keep the device busy and are estimated to fit it"),
        Entry(
            "rows_per_step", batch.rows_per_step,
            f"over all ranks: {batch.step_tokens:,} tokens. Step Law (Li et al. 2025): B = 0.58 D^0.571 = "
            f"{wanted:,.0f} for the D = {batch.tokens:,} tokens of this plan; rounded so that {_list_worlds(plan)} "
            "share it evenly",
        ),
    ]  # fmt: skip


def _list_worlds(plan: RecipePlan) -> str:
    worlds = sorted({plan.wish.world, *(w for w in (1, 2, 4, 8) if plan.batch.rows_per_step % w == 0)})
    return f"{', '.join(map(str, worlds[:-1]))} or {worlds[-1]} ranks"


def _engine_entries() -> list[Entry]:
    return [
        Entry("ds_config", "zero2", "optimizer and gradients sharded over the ranks"),
        Entry("gradient_checkpointing", "auto", "the least that is estimated to fit the device"),
    ]


def _optimizer_entries() -> list[Entry]:
    return [
        Entry("beta1", rules.BETA1, "both betas and the clipping: SmolLM-135M and Pythia"),
        Entry("beta2", rules.BETA2, ""),
        Entry("gradient_clipping", rules.CLIPPING, ""),
    ]


def _phase_entries(plan: RecipePlan) -> list[Entry]:
    batch = plan.batch
    shape = plan.text.shape
    N = shape.num_parameters - shape.num_table_parameters
    rate = f"Step Law (Li et al. 2025): 1.79 N^-0.713 D^0.307 with N = {N:,} parameters outside the token table"
    if plan.lr >= rules.HIGHEST_RATE:
        rate += f", held at {rules.HIGHEST_RATE:g}, SmolLM-135M's: the law was not fitted on models as small as this"
    return [
        Entry("name", "main", ""),
        Entry("steps", batch.steps, describe_horizon(plan)),
        Entry("lr", plan.lr, rate),
        Entry("weight_decay", rules.WEIGHT_DECAY, "Pythia"),
        Entry("schedule", "cosine", "over the whole plan (Hoffmann et al. 2022), down to where Step Law's runs end"),
        Entry("final_lr", rules.choose_final_rate(plan.lr), ""),
        Entry(
            "warmup_steps", plan.warmup_steps,
            f"1 % of the steps (Pythia), at least the 2 / (1 - beta2) = {rules.LEAST_WARMUP} of Ma & Yarats (2021), at "
            f"most the {rules.MOST_WARMUP:,} of SmolLM-135M, and no more than a tenth of a short plan",
        ),
    ]  # fmt: skip


def describe_horizon(plan: RecipePlan) -> str:
    """Why the plan is as long as it is."""
    wish = plan.wish
    optimal = rules.TOKENS_PER_PARAMETER * plan.text.shape.num_parameters
    if wish.tokens is not None:
        return f"as asked for with --tokens {wish.tokens:,}"
    if wish.hours is not None:
        return (
            f"what {wish.world} x {wish.device} is estimated to do in {wish.hours:g} hours, as asked for with --hours"
        )
    if optimal <= rules.MAX_EPOCHS * plan.text.train_tokens:
        return f"{rules.TOKENS_PER_PARAMETER} tokens a parameter: compute-optimal (Hoffmann et al. 2022)"
    return (
        f"{rules.MAX_EPOCHS} epochs of the text, more of which teach less and less (Muennighoff et al. 2023); "
        f"compute-optimal would be {rules.TOKENS_PER_PARAMETER} tokens a parameter (Hoffmann et al. 2022), "
        f"{format_count(optimal)}"
    )


def _evaluate_entries(plan: RecipePlan) -> list[Entry]:
    share = f"{rules.EVALUATION_SHARE:.0%}"
    return [
        Entry("every", plan.cadences.evaluate, f"steps: about {rules.NUM_EVALUATIONS} times, if there are so many"),
        Entry("rows", plan.cadences.evaluate_rows, f"so few that all evaluations take about {share} of the time"),
    ]


def _generation_entries(plan: RecipePlan) -> list[Entry]:
    return [
        Entry("max_tokens", min(100, plan.batch.sequence_length // 2), "of a sample"),
        Entry("temperature", 0.8, "those of the quickstart"),
        Entry("top_k", min(50, plan.text.shape.vocab_size), ""),
    ]


def _sample_entries(plan: RecipePlan) -> list[Entry]:
    prompts = ["**ROMEO**  \n", "**KING HENRY**  \n"] if not plan.wish.has_own_text else [""]
    source = "how speeches begin in the plays" if not plan.wish.has_own_text else "empty: the model begins a document"
    return [
        Entry("every", plan.cadences.sample, f"steps: about {rules.NUM_SAMPLES} times, if there are so many"),
        Entry("prompts", prompts, source),
    ]


def _checkpoint_entries(plan: RecipePlan) -> list[Entry]:
    most = rules.MOST_STEPS_BETWEEN_CHECKPOINTS
    return [
        Entry(
            "every", plan.cadences.checkpoint, f"steps: about a tenth of the plan, {most:,} at most, is lost in a crash"
        ),
        Entry("keep_last", 2, ""),
        Entry("keep_best", True, "where the text is read often, the best is not the last"),
    ]


def _render_entries(entries: list[Entry], *, is_item: bool) -> list[str]:
    """The lines of a section; `is_item` makes it a list of one."""
    lines: list[str] = []
    indent = SECTION_INDENT + ("  " if is_item else "")
    for number, entry in enumerate(entries):
        if entry.source:
            lines += textwrap.wrap(entry.source, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        begin = f"{SECTION_INDENT}- " if is_item and number == 0 else indent
        text = dump_yaml({entry.key: entry.value}).rstrip("\n")
        lines.append(begin + text.replace("\n", f"\n{indent}"))
    return lines
