"""The verb `smoltrain new`: plans a recipe, writes NAME.yaml, and says what it will take."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from smoltrain.config.load import load_config
from smoltrain.config.schema import Config
from smoltrain.estimate.constants import GIB, DeviceSpec
from smoltrain.estimate.devices import find_device
from smoltrain.estimate.fitting import build_fitted_setup, fit_config_to_memory
from smoltrain.estimate.horizon import format_count, format_hours
from smoltrain.estimate.report import Estimate
from smoltrain.files import report_unwritable
from smoltrain.new_recipe.hyperparameters import MAX_EPOCHS, optimal_num_tokens
from smoltrain.new_recipe.plan import SEPARATOR, RecipePlan, StudiedText, plan_recipe, study_text
from smoltrain.new_recipe.quantities import format_ratio, round_to_digits
from smoltrain.new_recipe.render import render_recipe
from smoltrain.new_recipe.wish import RecipeWish
from smoltrain.training.preflight import check_recipe

TRAINED_SHARE = 0.95  # of --hours; the rest is for starting, evaluating, sampling and saving
FEW_TOKENS_PER_PARAMETER = 1.0
MOST_ROUNDS = 8  # until tokens and speed agree


def write_new_recipe(wish: RecipeWish) -> None:
    """Write NAME.yaml here and print the plan. Errors: UserError for the device and the text."""
    path = Path(f"{wish.name}.yaml")
    console = Console(stderr=True)
    with console.status(f"what {wish.device} can do ..."):  # on terminals alone
        spec = find_device(wish.device, wish.world)
    with console.status("the text is read, and a tokenizer tried on it ..."):
        text = study_text(wish)
    plan = _plan_for_wish(wish, text, spec)
    recipe = render_recipe(plan)
    config = _load_text(recipe, wish)
    check_recipe(config)
    estimate = _estimate(config, wish, spec)
    _write_new_file(path, recipe)
    for line in describe_new_plan(plan, estimate):
        print(line)


def describe_new_plan(plan: RecipePlan, estimate: Estimate) -> Iterator[str]:
    """The plan in short, what should be known before it is trained, and the next commands."""
    wish, text, shape, batch = plan.wish, plan.text, plan.text.shape, plan.batch
    count = format_count
    name = f"{wish.name}.yaml"
    about = "" if text.sample.is_whole else "about "
    hours = batch.steps * estimate.speed.step_s / 3600
    memory = f"{estimate.memory.total / GIB:.1f} of {estimate.device.memory / GIB:.1f} GiB a rank"
    yield f"{name}: each value stands below what it came from"
    yield f"  parameters   {shape.num_parameters:,} ({count(wish.num_parameters)} asked for)"
    yield (
        f"  shape        {shape.num_hidden_layers} blocks {shape.hidden_size} wide, {shape.num_attention_heads} heads "
        f"({shape.num_key_value_heads} of keys), {shape.vocab_size:,} ids"
    )
    held_out = count(text.held_out_tokens)
    where = f"{held_out} of them held out" if text.validation_share is not None else f"and {held_out} held out"
    yield f"  text         {about}{count(text.vocabulary.text_tokens)} tokens, {where}"
    yield f"  plan         {batch.steps:,} steps of {batch.rows_per_step:,} rows x {batch.sequence_length:,} tokens"
    yield (
        f"  tokens       {count(batch.tokens)} = {format_ratio(plan.tokens_per_parameter)} a parameter, "
        f"{format_ratio(plan.epochs)} epochs"
    )
    yield f"  rate         {plan.lr:g}, {plan.warmup_steps:,} steps of warm-up, cosine"
    yield f"  {f'{wish.world} x {wish.device}':<12} {format_hours(hours)}, {memory} (both estimated)"
    for note in (*text.sample.notes, *_list_notes(plan, estimate)):
        yield f"note: {note}"
    yield f"next: smoltrain train {name}"
    yield f"      smoltrain estimate {name} --device {wish.device} --world {wish.world}"


def _list_notes(plan: RecipePlan, estimate: Estimate) -> Iterator[str]:
    wish, text = plan.wish, plan.text
    if not wish.has_own_text:
        yield "no --data was given, so it trains on the plays of Shakespeare"
    if plan.epochs > MAX_EPOCHS * 1.05:
        yield f"a text read more than {MAX_EPOCHS} times teaches less and less (Muennighoff et al. 2023)"
    elif wish.tokens is None and wish.hours is None and plan.tokens_per_parameter < 0.95 * 20:
        yield f"the text ends the plan after {MAX_EPOCHS} epochs; compute-optimal are 20 tokens a parameter"
    if plan.tokens_per_parameter < FEW_TOKENS_PER_PARAMETER:
        yield "less than a token a parameter: a smaller model, or more text, would do better"
    if not estimate.fits:
        yield f"it is not estimated to fit {wish.world} x {wish.device}"
    if text.sample.parts_documents:
        yield f"{SEPARATOR!r} stands in the files, so it parts documents (data.documents: separator)"
    if text.sample.needs_cached_mode:
        yield "all tokens are made before the first step (data.mode: cached)"


# ---- the plan


def _plan_for_wish(wish: RecipeWish, text: StudiedText, spec: DeviceSpec) -> RecipePlan:
    """Errors: those of plan_recipe."""
    shortest = optimal_num_tokens(text.shape.num_parameters, text.train_tokens)
    if wish.hours is None:
        return plan_recipe(wish, text, wish.tokens or shortest)
    # The batch depends on the tokens, and the speed a little on the batch.
    tokens = float(shortest)
    for _ in range(MOST_ROUNDS):
        plan = plan_recipe(wish, text, tokens)
        step_s = _estimate(_load_text(render_recipe(plan), wish), wish, spec).speed.step_s
        before = tokens
        tokens = TRAINED_SHARE * 3600 * wish.hours / step_s * plan.batch.step_tokens
        if abs(tokens / before - 1) < 0.01:
            break
    return plan_recipe(wish, text, round_to_digits(tokens, 2))


def _estimate(config: Config, wish: RecipeWish, spec: DeviceSpec) -> Estimate:
    """Of the config on the devices that were wished for."""
    fitted = fit_config_to_memory(config, spec.memory, wish.world, device=spec.kind)
    return Estimate(build_fitted_setup(fitted, spec.memory, wish.world, device=spec.kind), spec)


def _load_text(recipe: str, wish: RecipeWish) -> Config:
    """What `smoltrain train` would load. Errors: those of load_config, which are none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{wish.name}.yaml"
        path.write_text(recipe, encoding="utf-8")
        return load_config(str(path))


def _write_new_file(path: Path, text: str) -> None:
    """Errors: UserError if it exists by now, or cannot be written."""
    with report_unwritable("the recipe", "a folder to write to", str(path)), path.open("x", encoding="utf-8") as file:
        file.write(text)
