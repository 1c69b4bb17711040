"""Measurements of this machine, each a command: `python -m benchmarks.train`. Timings live here and in no test."""
