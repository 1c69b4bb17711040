"""Training: where a run begins, the session that it opens, the loop, and one step."""
