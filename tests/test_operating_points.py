"""Operating points: which thresholds are considered, and what is expected of them."""

import itertools

import pytest
import torch

from hierens.inference.calibration import exits
from hierens.inference.operating_points import batch_ms, operating_points

TIMES = [[1.0, 2.0, 4.0], [1.5, 3.0, 6.0], [2.5, 5.0, 10.0]]  # of batches of 1, 2 and 4


def made_up(count=400, wrong=0.2):
    """Certainties and classes of three depths: the less certain the first two are, the more often they are wrong."""
    generator = torch.Generator().manual_seed(0)
    certainties = torch.rand(count, 3, generator=generator)
    classes = torch.zeros(count, 3, dtype=torch.long)
    classes[:, :2] = torch.rand(count, 2, generator=generator) < 2 * wrong * (1 - certainties[:, :2])
    return certainties, classes


def test_points_are_a_front_and_what_is_expected_of_them_is_so():
    certainties, classes = made_up()
    points = operating_points(certainties, classes, TIMES)
    assert len(points) >= 4 and points[0].agreement == 1 and points[0].depth == 2
    assert points[-1].reached == (1, 0, 0) and points[-1].times_ms == pytest.approx((1.0, 1.5, 2.5))
    for better, cheaper in itertools.pairwise(points):
        assert better.agreement > cheaper.agreement and better.times_ms[-1] > cheaper.times_ms[-1]
    for point in points:
        left = exits(certainties, point.thresholds)
        agrees = float((classes.gather(1, left[:, None])[:, 0] == classes[:, 2]).double().mean())
        assert point.agreement <= agrees and point.agreement == pytest.approx(agrees, abs=0.005)
        assert point.reached == pytest.approx([float((left >= depth).double().mean()) for depth in range(3)])


def test_few_images_make_careful_thresholds():
    certainties, _ = made_up(4)
    points = operating_points(certainties, torch.zeros(4, 3, dtype=torch.long), TIMES)
    assert [point.agreement for point in points[1:]] == pytest.approx([1 - 1 / 6]), "although none disagreed"


def test_the_time_of_a_batch_is_that_of_its_shrinking_steps():
    assert batch_ms(TIMES, (1, 1, 1), 4) == 10 and batch_ms(TIMES, (1, 1, 0), 2) == 3
    assert batch_ms(TIMES, (1, 1, 0), 3) == 4, "between the sizes that were measured"
    assert batch_ms(TIMES, (1, 1, 0), 8) == 9, "beyond the largest"
    assert batch_ms(TIMES, (1, 0.25, 0), 1) == pytest.approx(1 + 0.25), "one image goes on in a quarter of all cases"
    some = 1 - 0.5**2
    assert batch_ms(TIMES, (1, 0.5, 0), 2) == pytest.approx(1.5 + some * (1 + 0.5 * (1 / some - 1)))
    assert batch_ms([[2.0, 3.0]], (1, 1), 1) == 3
