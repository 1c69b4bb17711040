"""Training: where a run begins, the session that it opens, the loop, and one step.

A program calls the package itself, `smoltrain.train(config)`: help("smoltrain.library.training.train") says how.
"""
