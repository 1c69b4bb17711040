"""Passages as HTML: the prompt apart from the answer, and nothing in them is more than text."""

from smoltrain.inference.demo_passages import DemoPassage, render_passages


def test_prompt_and_answer_are_told_apart_and_are_text():
    shown = render_passages([DemoPassage("a & b", "<i>\x1b", "</pre>\n&lt;"), DemoPassage("c", "")], 7)
    assert shown == (
        '<div class="side-by-side">'
        '<article><h4>a &amp; b</h4><pre><span class="prompt">&lt;i&gt;␛</span>'
        '<mark class="answer">&lt;/pre&gt;\n&amp;lt;</mark></pre></article>'
        '<article><h4>c</h4><pre><mark class="answer"></mark></pre></article>'
        "</div><p>In italics the prompt, marked what the model has written; seed <b>7</b>.</p>"
    )
