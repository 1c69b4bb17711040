"""Tokens: documents tokenised once into files that are indexed, hashed and verified at every start."""
