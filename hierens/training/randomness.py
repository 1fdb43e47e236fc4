"""Random numbers that depend only on given integers, not on earlier draws, so that runs can be repeated."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*numbers: int) -> int:
    """A seed of 64 bits from several integers, which may be negative; other integers give another seed.

    Examples:
        >>> seed_of(0, 1) != seed_of(0, 1, 0), seed_of(-1) != seed_of(-2)
        (True, True)
    """
    return int(_sequence(numbers).generate_state(1, np.uint64)[0])


def _sequence(numbers: tuple[int, ...]) -> np.random.SeedSequence:
    """Numpy's mixing of the numbers, the same on every machine.

    It takes non-negative 32-bit words and ignores zeros at the end. So each number is written as its sign and number of
    words, followed by the words, and the count of numbers comes first.
    """
    words = [len(numbers)]
    for number in numbers:
        size = abs(number)
        own = [(size >> shift) & 0xFFFFFFFF for shift in range(0, size.bit_length(), 32)]
        words += [2 * len(own) + (number < 0), *own]
    return np.random.SeedSequence(words)


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seed the generators of Python, numpy and torch's CPU, used by augmentations; restore their states at the end."""
    python, torchs = random.getstate(), torch.get_rng_state()
    numpys = np.random.get_bit_generator()  # type: ignore[attr-defined]
    sequence = _sequence(numbers)
    seed = int(sequence.generate_state(1, np.uint64)[0])
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    # Another generator, since numpy takes 100 us to save and restore a state.
    np.random.set_bit_generator(np.random.MT19937(sequence))  # type: ignore[attr-defined]
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(torchs)
        np.random.set_bit_generator(numpys)  # type: ignore[attr-defined]
