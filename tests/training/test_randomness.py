"""Random numbers that depend on what they are for, and leave the caller's generators alone."""

import random

import numpy as np
import torch

from hierens.training.randomness import random_numbers_of, seed_of


def draws():
    return random.random(), np.random.rand(), np.random.standard_normal(), torch.rand(()).item()


def test_the_same_numbers_draw_the_same_and_others_do_not():
    found = []
    for numbers in ((1, 2, 3), (1, 2, 3), (1, 3, 2), (0, 2, 3)):
        draws()
        with random_numbers_of(*numbers):
            found.append(draws())
    assert found[0] == found[1]
    for first, second in ((0, 2), (0, 3), (2, 3)):
        assert all(a != b for a, b in zip(found[first], found[second], strict=True))


def after(between):
    """What is drawn in the end, with something in between."""
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    first = random.random(), np.random.rand(), torch.rand(()).item()
    between()
    return first, random.random(), np.random.rand(), torch.rand(()).item()


def test_the_caller_draws_on_as_if_nothing_had_been():
    def other():
        with random_numbers_of(7):
            draws()

    def nested():
        with random_numbers_of(7):
            outer = draws()
            other()
            assert draws() != outer and draws() != draws()

    assert after(lambda: None) == after(other) == after(nested)


def test_seeds_differ_wherever_a_number_does():
    assert len({seed_of(a, b, c) for a in range(5) for b in range(5) for c in range(5)}) == 125
