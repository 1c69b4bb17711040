"""`smoltrain new`: a recipe for a size and a text by published rules, each value with its source."""
