"""Texts to plan recipes for: a small one that is read, and one that would be too large to lie here."""

from pathlib import Path

from smoltrain.config.schema import DataSection
from smoltrain.new_recipe.plan import StudiedText
from smoltrain.new_recipe.sample import TextSample
from smoltrain.new_recipe.shape import choose_decoder_shape, largest_table
from smoltrain.new_recipe.text import MOST_IDS, FittedVocabulary
from smoltrain.new_recipe.wish import PLAYS, RecipeWish

TEXT = "the king and his daughter went down to the river where a boat lay in the reeds and nobody spoke of it"
WORDS = TEXT.split()


def write_texts(folder: Path, num_files: int = 20, num_sentences: int = 60) -> Path:
    """A folder of short texts, no two of them alike."""
    folder.mkdir(parents=True)
    for number in range(num_files):
        sentences = []
        for i in range(num_sentences):
            first = (7 * number + 3 * i) % len(WORDS)
            words = [WORDS[(first + (i + 1) * j) % len(WORDS)] for j in range(6 + (number + i) % 9)]
            sentences.append(f"{' '.join(words).capitalize()} {number * num_sentences + i}.")
        (folder / f"{number:03}.txt").write_text("\n".join(sentences) + "\n", encoding="utf-8")
    return folder


def study_large_text(wish: RecipeWish) -> StudiedText:
    """What study_text would find of ten terabytes of text, which limit nothing."""
    size = min(MOST_IDS, largest_table(wish.num_parameters)) // 64 * 64
    sample = TextSample(
        documents=(), total_bytes=1e13, is_whole=False, num_files=1000, is_streamed=True, notes=(),
        parts_documents=False, all_fields=True, document_bytes=None, held_out_bytes=None,
    )  # fmt: skip
    vocabulary = FittedVocabulary(size, "the model", bytes_per_token=4.0, text_tokens=2.5e12)
    shape = choose_decoder_shape(wish.num_parameters, size)
    return StudiedText(sample, vocabulary, shape, validation_share=0.005, held_out_tokens=1.25e10)


def make_wish(params: int, *, tokens: int | None = None, world: int = 1, path: str | None = "/texts") -> RecipeWish:
    """A wish without hours."""
    data = PLAYS if path is None else DataSection(path=path)
    return RecipeWish("tiny", params, tokens, None, "h100", world, data)
