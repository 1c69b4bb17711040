"""The version of smoltrain: the one place that says it. `smoltrain.__version__` is the same."""

VERSION = "0.1.0"
