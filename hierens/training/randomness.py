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
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = hash(numbers) % 2**32
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
