"""Measurements of this machine: `smoltrain bench`. Timings live here and in no test."""
