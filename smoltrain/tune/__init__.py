"""Tuning: short runs of one plan over a grid of keys, on the same rows, and what they say about the best values."""
