"""A random generator for every (seed, purpose, number), so that no draw depends on what was drawn before.

Splits, crops, synthetic volumes and the places of foreground all draw from it. Version 1.0.
"""
import numpy as np


def seeded(seed: int, purpose: str, number: int = 0) -> np.random.Generator:
    """A generator of its own for every (seed, purpose, number). Seeds below 0 count too."""
    words = [seed & 2**64 - 1, int.from_bytes(purpose.encode(), "big"), number]
    return np.random.Generator(np.random.PCG64(words))
