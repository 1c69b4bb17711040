"""smoltrain pretrains small language models (80M-1B parameters) on one to many GPUs."""

__version__ = "0.1.0"
