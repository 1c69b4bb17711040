"""The description of a run: schema, rules, recipe and overrides, and the variables of W&B."""
