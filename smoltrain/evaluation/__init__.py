"""Judging a trained model: the perplexity of any text, tasks of lm-evaluation-harness, what it has memorised."""
