"""Random numbers that depend on what they are for, and leave the caller's generators alone."""

import itertools
import random

import numpy as np
import torch

from hierens.training.randomness import seed_of, seeded


def draws():
    return random.random(), np.random.rand(), np.random.standard_normal(), torch.rand(()).item()


def test_the_same_numbers_draw_the_same_and_others_do_not():
    found = []
    for numbers in ((1, 2, 3), (1, 2, 3), (1, 3, 2), (0, 2, 3)):
        draws()
        with seeded(*numbers):
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
        with seeded(7):
            draws()

    def nested():
        with seeded(7):
            outer = draws()
            other()
            assert draws() != outer and draws() != draws()

    assert after(lambda: None) == after(other) == after(nested)


def test_seeds_differ_wherever_a_number_does():
    hard = (-(2**64), -(2**61), -(2**32), -3, -2, -1, 0, 1, 2, 2**31, 2**32 - 1, 2**32, 2**61 - 1, 2**61, 2**64)
    steps, batches, processes = (0, 1, 2, 499, 500), (0, 1, 2, 2**32), range(4)
    grid = [
        *itertools.product(hard, steps, batches, processes),  # (seed, step, batch, process), as training asks
        *itertools.product(hard, hard),  # of other lengths, none of which is another with zeros behind it
        *((number,) for number in hard),
        (),
    ]
    assert len({seed_of(*numbers) for numbers in grid}) == len(grid)
    assert all(0 <= seed_of(*numbers) < 2**64 for numbers in grid)


def test_what_augmentations_draw_differs_where_the_seed_does():
    found = []
    for numbers in ((-1, 0, 5), (-2, 0, 5), (0, 0, 5), (2**61 - 1, 0, 5)):
        with seeded(*numbers):
            found.append(draws())
    for first, second in itertools.combinations(found, 2):
        assert all(a != b for a, b in zip(first, second, strict=True))


def test_seeds_are_the_same_on_every_machine():
    assert [seed_of(0, 0, 0, 0), seed_of(-1, 7), seed_of(2**61 - 1)] == [
        16363712187084821697,
        12760655878706035074,
        18174112819074749528,
    ]
