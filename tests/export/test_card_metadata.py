"""The metadata is left out where nothing is known, and what is not a number is no result."""

import math
from typing import Any

import pytest
from huggingface_hub import ModelCard

from smoltrain.config.hub_licenses import HUB_LICENSES
from smoltrain.config.load import override_export
from smoltrain.config.schema import ExportSection
from smoltrain.errors import UserError
from smoltrain.evaluation.results import Evaluation
from smoltrain.export.card_metadata import write_card_metadata


def test_what_is_not_known_is_left_out():
    text = write_card_metadata("mine", "llama", ExportSection(), None, {}, None)
    data = ModelCard(f"---\n{text}\n---\n").data.to_dict()
    assert data.keys() == {"library_name", "pipeline_tag", "tags"}


def test_what_is_not_a_number_is_no_result():
    last = {"validation/loss_nats_per_token": math.nan, "validation/perplexity": math.inf}
    evaluation = Evaluation(step=1, tasks={"task": {"acc": math.nan}}, details={})
    text = write_card_metadata("mine", "llama", ExportSection(), None, last, evaluation)
    assert "model-index" not in text


@pytest.mark.parametrize("name", ["Apache 2.0", "apache2", "proprietary"])
def test_a_licence_that_the_hub_does_not_list_is_refused_with_one_that_it_does(name: str):
    with pytest.raises(UserError, match=r"a licence that the Hub lists, as .*(apache-2\.0|mit)") as refused:
        override_export(ExportSection(), {"license": name})
    assert str(refused.value).startswith(f"export.license is not valid: saw {name!r}, want ")
    assert str(refused.value).endswith("; change --license")


def test_a_language_is_a_code():
    want = "want a code of ISO 639, as en or de; or code, or multilingual; change --language"
    with pytest.raises(UserError, match=want) as refused:
        override_export(ExportSection(), {"language": ["en", "english"]})
    assert "saw 'english'" in str(refused.value)


def test_options_take_the_place_of_the_recipes_words():
    section = ExportSection(license="other", license_name="Mine", language=("en",))
    assert override_export(section, {"license": None, "language": None}) == section
    assert override_export(section, {"license": "mit"}) == ExportSection(license="mit", language=("en",))
    assert override_export(section, {"language": ["de"]}).language == ("de",)
    for wrong in ({"license": "other"}, {"license_name": "Mine"}, {"language": ["English"]}):
        with pytest.raises(UserError):
            override_export(ExportSection(), wrong)


def test_every_licence_of_the_list_is_a_word_that_yaml_keeps():
    assert len(set(HUB_LICENSES)) == len(HUB_LICENSES) > 60
    for name in HUB_LICENSES:
        given = "Mine" if name == "other" else None
        text = write_card_metadata("m", "llama", ExportSection(license=name, license_name=given), None, {}, None)
        card: Any = ModelCard(f"---\n{text}\n---\n")
        assert card.data.license == name
