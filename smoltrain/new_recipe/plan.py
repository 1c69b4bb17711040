"""What a new recipe decides, before it is put into words: of a wish and a text, by the rules of this room."""

from dataclasses import dataclass

from smoltrain.config.schema import TokenizerSection
from smoltrain.errors import Problem, UserError
from smoltrain.new_recipe import hyperparameters as rules
from smoltrain.new_recipe.hyperparameters import BatchPlan, Cadences
from smoltrain.new_recipe.sample import TextSample, sample_text
from smoltrain.new_recipe.shape import DecoderShape, choose_decoder_shape, largest_table
from smoltrain.new_recipe.text import FittedVocabulary, choose_validation_share, fit_vocabulary
from smoltrain.new_recipe.wish import RecipeWish

SEPARATOR = str(TokenizerSection.model_fields["separator"].default)
HELD_OUT_TOKENS = 65_536  # to validate on: 32 rows of 2,048
LARGEST_HELD_OUT_SHARE = 0.05  # of a short text


@dataclass(frozen=True)
class StudiedText:
    """The text, the tokenizer that fits it and the model, and the model that fits the tokenizer."""

    sample: TextSample
    vocabulary: FittedVocabulary
    shape: DecoderShape
    validation_share: float | None  # of the documents; None where the text has held-out files or a split of its own
    held_out_tokens: float

    @property
    def train_tokens(self) -> float:
        """What is not held out."""
        of_the_text = 0.0 if self.validation_share is None else self.held_out_tokens
        return self.vocabulary.text_tokens - of_the_text


@dataclass(frozen=True)
class RecipePlan:
    """All values of a recipe that are not the same in each."""

    wish: RecipeWish
    text: StudiedText
    batch: BatchPlan
    lr: float
    warmup_steps: int
    cadences: Cadences

    @property
    def epochs(self) -> float:
        """How often the text is read."""
        return self.batch.tokens / self.text.train_tokens

    @property
    def tokens_per_parameter(self) -> float:
        """Of the plan's tokens, repeated ones too."""
        return self.batch.tokens / self.text.shape.num_parameters


def study_text(wish: RecipeWish) -> StudiedText:
    """Read the text, and fit tokenizer and model to it. Errors: those of sample_text."""
    sample = sample_text(wish.data)
    vocabulary = fit_vocabulary(sample, largest_table(wish.num_parameters), SEPARATOR)
    if sample.held_out_bytes is None:
        wanted = min(HELD_OUT_TOKENS, LARGEST_HELD_OUT_SHARE * vocabulary.text_tokens)
        share, held_out = choose_validation_share(sample, vocabulary, wanted)
    else:
        share = None
        held_out = sample.held_out_bytes / vocabulary.bytes_per_token
    shape = choose_decoder_shape(wish.num_parameters, vocabulary.size)
    return StudiedText(sample, vocabulary, shape, share, held_out)


def plan_recipe(wish: RecipeWish, text: StudiedText, tokens: float) -> RecipePlan:
    """The plan of so many tokens. Errors: those of plan_batch; UserError for a text of which no row can be held out."""
    shape = text.shape
    batch = rules.plan_batch(shape.num_parameters, tokens, text.train_tokens, wish.world)
    if text.held_out_tokens < batch.sequence_length + 1:
        saw, want = f"about {text.held_out_tokens:,.0f} tokens", f"a row of {batch.sequence_length:,} to hold out"
        change = "--data or --hub" if text.validation_share is not None else "--validation"
        raise UserError(Problem("the text is too short to validate on", saw, want, change))
    return RecipePlan(
        wish=wish,
        text=text,
        batch=batch,
        lr=rules.choose_learning_rate(shape.num_parameters - shape.num_table_parameters, batch.tokens),
        warmup_steps=rules.choose_warmup(batch.steps),
        cadences=rules.choose_cadences(batch, text.held_out_tokens / batch.sequence_length),
    )
