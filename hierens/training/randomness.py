"""Random numbers that depend on names and numbers, not on what was drawn before: what makes runs repeatable."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*numbers: int) -> int:
    """One seed out of several whole numbers, different wherever any of them is."""
    return hash(numbers) % 2**63


@contextmanager
def random_numbers_of(*numbers: int) -> Iterator[None]:
    """Python's, numpy's and torch's CPU generator, which augmentations draw from: seeded inside, as they were after."""
    python, torchs = random.getstate(), torch.get_rng_state()
    numpys = np.random.get_bit_generator()  # type: ignore[attr-defined]
    seed = hash(numbers) % 2**32
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    # Another generator, since numpy takes 100 us to copy a state and bring it back.
    np.random.set_bit_generator(np.random.MT19937(0))  # type: ignore[attr-defined]
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(torchs)
        np.random.set_bit_generator(numpys)  # type: ignore[attr-defined]
