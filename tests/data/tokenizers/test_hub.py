"""The names of tokenizers on the Hub; tests/data/documents/test_hub.py loads one from a small Hub over real HTTP."""

import pytest

from smoltrain.data.tokenizers.hub import is_hub_repo_name


@pytest.mark.parametrize(
    ("name", "is_one"),
    [("a/b", True), ("A-1/b_c.d", True), ("a", False), ("a/b/c", False), ("./a", False), ("/a", False)],
)
def test_the_form_of_a_name(name: str, is_one: bool):
    assert is_hub_repo_name(name) is is_one
