"""A run as a Hugging Face folder: written, verified with transformers alone, described, uploaded."""
