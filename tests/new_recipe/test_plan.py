"""A plan as a whole: of a wish and a text."""

from dataclasses import replace
from pathlib import Path

import pytest

from smoltrain.config.schema import DataSection
from smoltrain.errors import UserError
from smoltrain.new_recipe.plan import plan_recipe, study_text
from tests.new_recipe.texts import make_wish, write_texts


def test_the_parts_of_a_plan_fit_each_other(tmp_path: Path):
    wish = make_wish(2_000_000, path=str(write_texts(tmp_path / "texts")))
    text = study_text(wish)
    assert text.shape.vocab_size == text.vocabulary.size
    plan = plan_recipe(wish, text, 4 * text.train_tokens)
    assert plan.epochs == pytest.approx(4, rel=0.02)
    assert plan.tokens_per_parameter == pytest.approx(plan.batch.tokens / text.shape.num_parameters)
    assert plan.cadences.evaluate_rows * plan.batch.sequence_length <= text.held_out_tokens
    assert plan == plan_recipe(wish, study_text(wish), 4 * text.train_tokens), "equal wishes, equal plans"


def test_a_text_of_which_no_row_can_be_held_out_is_refused(tmp_path: Path):
    path = tmp_path / "short.txt"
    path.write_text("to be or not to be, that is the question. " * 5)
    wish = make_wish(2_000_000, path=str(path))
    with pytest.raises(UserError, match=r"the text is too short to \w+ on: saw about"):
        plan_recipe(wish, study_text(wish), 1000)


def test_a_text_with_files_that_are_held_out_is_trained_on_whole(tmp_path: Path):
    held_out = tmp_path / "valid.txt"
    held_out.write_text((write_texts(tmp_path / "texts") / "000.txt").read_text() + "the end\n")
    data = DataSection(path=str(tmp_path / "texts"), validation_path=str(held_out))
    wish = replace(make_wish(2_000_000), data=data)
    text = study_text(wish)
    assert text.validation_share is None
    assert text.train_tokens == text.vocabulary.text_tokens
    assert text.held_out_tokens == pytest.approx(held_out.stat().st_size / text.vocabulary.bytes_per_token)
    held_out.write_text("the king")
    with pytest.raises(UserError, match=r"too short to validate on: saw .*; change --validation$"):
        plan_recipe(wish, study_text(wish), 1000)
