"""What a stranger has written is shown as it is, and is no markup."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown import Markdown

from smoltrain.export.markdown_text import escape_markdown, fence_code, quote_code

TEXTS = st.text("ab`|<>*_[]()#!\\\n &-", max_size=20)


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "[a](javascript:x)", "*b* | `c`", "# d", "![e](f)"])
def test_a_line_is_text(text: str):
    page = Markdown().convert(escape_markdown(text))
    assert set(re.findall(r"<(\w+)", page)) <= {"p"}


@given(TEXTS)
def test_no_fence_is_closed_by_what_is_in_it(text: str):
    fence, body, end = re.fullmatch("(`+)text\n(.*)\n(`+)", fence_code(text), re.DOTALL).groups()  # type: ignore[union-attr]
    assert fence == end
    assert body == text
    assert fence not in text


@given(TEXTS)
def test_a_code_span_ends_where_it_should(text: str):
    quoted = quote_code(text)
    fence = re.match("`+", quoted)
    assert fence
    inner = quoted[len(fence[0]) : -len(fence[0])]
    assert fence[0] not in re.findall("`+", inner)
    assert "\n" not in quoted
