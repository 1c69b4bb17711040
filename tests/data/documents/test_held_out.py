"""The split: a function of a document's name alone, the same in every version and on every machine."""

import pytest

from smoltrain.data.documents.held_out import is_held_out

NAMES = [f"web/{i:03}.jsonl:{i}" for i in range(4000)]


def test_a_larger_share_holds_out_the_same_documents_and_more():
    small, large = ({name for name in NAMES if is_held_out(name, share)} for share in (0.05, 0.2))
    assert small < large
    assert len(small) == pytest.approx(0.05 * len(NAMES), rel=0.2)
    assert len(large) == pytest.approx(0.2 * len(NAMES), rel=0.1)
    assert not any(is_held_out(name, 0.0) for name in NAMES)
    assert all(is_held_out(name, 1.0) for name in NAMES)


def test_the_split_is_that_of_every_version():
    """`printf plays/tragedies/hamlet.md | sha256sum` begins with 38e2de6994b75871."""
    point = 0x38E2DE6994B75871 / 2**64
    assert not is_held_out("plays/tragedies/hamlet.md", point - 1e-9)
    assert is_held_out("plays/tragedies/hamlet.md", point + 1e-9)
