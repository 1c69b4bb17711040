"""What models have written, as HTML of the demo's page: side by side, the prompt told apart from the answer."""

import html
from dataclasses import dataclass

from smoltrain.terminal import CONTROL_PICTURES

CSS = """
#passages .side-by-side {
  display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr));
}
#passages article {
  border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg); padding: 0.75rem 1rem; min-width: 0;
}
#passages h4 {margin: 0 0 0.5rem; font-size: var(--text-sm); color: var(--block-title-text-color)}
#passages pre {
  margin: 0; font-family: var(--font-mono); font-size: var(--text-md); white-space: pre-wrap; overflow-wrap: anywhere;
}
#passages .prompt {color: var(--block-title-text-color); font-style: italic}
#passages .answer {background: var(--primary-50); color: var(--body-text-color); border-radius: 2px}
.dark #passages .answer {background: var(--primary-950)}
#passages p {margin: 0.5rem 0 0; font-size: var(--text-sm); color: var(--block-title-text-color)}
"""


@dataclass
class DemoPassage:
    """The text of one model: the prompt, and what it has made of it so far."""

    title: str
    prompt: str
    answer: str = ""


def render_passages(passages: list[DemoPassage], seed: int) -> str:
    """All of them, each under its title, and the seed that they were drawn with. Everything in them is text."""
    articles: list[str] = []
    for passage in passages:
        prompt = f'<span class="prompt">{_escape(passage.prompt)}</span>' if passage.prompt else ""
        answer = f'<mark class="answer">{_escape(passage.answer)}</mark>'
        articles.append(f"<article><h4>{_escape(passage.title)}</h4><pre>{prompt}{answer}</pre></article>")
    legend = "<p>In italics the prompt, marked what the model has written; seed <b>{}</b>.</p>"
    return f'<div class="side-by-side">{"".join(articles)}</div>{legend.format(seed)}'


def _escape(text: str) -> str:
    return html.escape(text.translate(CONTROL_PICTURES))
