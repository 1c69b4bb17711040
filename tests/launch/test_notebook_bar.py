"""The bar of a notebook says where training is, in HTML and in plain text."""

import sys
from types import SimpleNamespace
from typing import Any

import IPython.display
import pytest

from smoltrain.launch import notebook_bar
from smoltrain.launch.notebook_bar import NotebookBar, is_notebook


def test_a_kernel_is_a_notebook_and_a_terminal_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_notebook()
    kernel = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: kernel))
    assert is_notebook()
    monkeypatch.delitem(sys.modules, "IPython")
    assert not is_notebook(), "what was never imported is no notebook"


def test_the_bar_follows_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    clock = [100.0]

    def display(bar: Any, display_id: bool) -> Any:
        assert display_id
        drawn.append(repr(bar))
        return SimpleNamespace(update=lambda bar: drawn.append(repr(bar)))

    monkeypatch.setattr(IPython.display, "display", display)
    monkeypatch.setattr(notebook_bar.time, "monotonic", lambda: clock[0])
    bar = NotebookBar(2, 100)
    for step in range(3, 11):
        clock[0] += 0.1
        bar(step, {"train/loss_nats_per_token": 2.5, "speed/tokens_per_s": 1234.5})
    assert drawn == [
        "step 2 of 100: starting",
        "step 5 of 100: loss 2.5000, 1,234 tokens/s, 0:09 left",
        "step 8 of 100: loss 2.5000, 1,234 tokens/s, 0:09 left",
    ], "not at every step"
    bar(100, {"train/loss_nats_per_token": 2.5, "speed/tokens_per_s": 1234.5})
    assert drawn[-1] == "step 100 of 100: loss 2.5000, 1,234 tokens/s, 0:00 left", "but always at the last one"
    assert bar._repr_html_().startswith('<progress value="100" max="100">')
