"""The description of a run: schema, rules, recipe and overrides, and what may differ when a run is resumed."""
