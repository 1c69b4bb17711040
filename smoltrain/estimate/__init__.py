"""What a run will need before it is started: memory by part, seconds of a step, and what to change so that it fits."""
