"""Random numbers that depend on names and numbers, not on what was drawn before: what makes runs repeatable."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*numbers: int) -> int:
    """One seed of 64 bits out of several whole numbers: others, also negative ones, give another seed.

    Examples:
        >>> seed_of(0, 1) != seed_of(0, 1, 0), seed_of(-1) != seed_of(-2)
        (True, True)
    """
    return int(_sequence(numbers).generate_state(1, np.uint64)[0])


def _sequence(numbers: tuple[int, ...]) -> np.random.SeedSequence:
    """Numpy's mixing of the numbers, the same on every machine.

    It takes 32-bit words, none of them negative, and does not tell zeros at the end from nothing. So each number is
    written as a sign, how many words follow, and those; and before all of them, how many they are.
    """
    words = [len(numbers)]
    for number in numbers:
        size = abs(number)
        own = [(size >> shift) & 0xFFFFFFFF for shift in range(0, size.bit_length(), 32)]
        words += [2 * len(own) + (number < 0), *own]
    return np.random.SeedSequence(words)


@contextmanager
def random_numbers_of(*numbers: int) -> Iterator[None]:
    """Python's, numpy's and torch's CPU generator, which augmentations draw from: seeded inside, as they were after."""
    python, torchs = random.getstate(), torch.get_rng_state()
    numpys = np.random.get_bit_generator()  # type: ignore[attr-defined]
    sequence = _sequence(numbers)
    seed = int(sequence.generate_state(1, np.uint64)[0])
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    # Another generator, since numpy takes 100 us to copy a state and bring it back.
    np.random.set_bit_generator(np.random.MT19937(sequence))  # type: ignore[attr-defined]
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(torchs)
        np.random.set_bit_generator(numpys)  # type: ignore[attr-defined]
