"""Tokenizers: by name, from the Hub, out of packages or trained; and how much of a text their ids say."""
