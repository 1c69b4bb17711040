"""Which documents are held out for validation: a function of a document's name alone."""

import hashlib


def is_held_out(name: str, share: float) -> bool:
    """Whether the document of this name is for validation: a fixed point of [0, 1) for each name, compared to `share`.

    A larger share therefore holds out the same documents and more.
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < share * 2**64
