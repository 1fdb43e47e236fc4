"""Measures of uncertainty against plain loops, and at their ends."""

import math

import pytest
import torch

from hierens.evaluation.uncertainty import MEASURES, certainty, mutual_information, risk_coverage, variance


@pytest.fixture
def leaf_logits():
    return 2 * torch.randn(40, 4, 5, generator=torch.Generator().manual_seed(0))


def test_certainty_lies_between_nothing_and_everything():
    uniform, sure = torch.zeros(1, 4), torch.tensor([[50.0, 0.0, 0.0, 0.0]])
    apart, agreed = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[0, 0, 0, 0]])
    for measure, lowest in zip(MEASURES, (0.25, 0.0, 0.0, 0.25 - 0.75 / 4), strict=True):
        assert certainty(uniform, apart, measure).item() == pytest.approx(lowest, abs=1e-6)
        assert certainty(sure, agreed, measure).item() == pytest.approx(1.0)


def test_agreement_counts_votes_first_and_probability_second():
    logits = torch.tensor([[1.0, 0.0], [9.0, 0.0], [0.2, 0.0]])
    votes = torch.tensor([[0, 0], [0, 1], [0, 0]])
    assert certainty(logits, votes, "agreement").argsort().tolist() == [1, 2, 0]


def test_mutual_information_is_the_mean_divergence_from_the_mean(leaf_logits):
    p = leaf_logits.double().softmax(-1)
    divergence = (p * (p / p.mean(1, keepdim=True)).log()).sum(-1).mean(1)
    assert torch.allclose(mutual_information(leaf_logits.double()), divergence.float(), atol=1e-5)


def test_mutual_information_lies_between_one_network_and_full_disagreement(leaf_logits):
    assert mutual_information(leaf_logits[:, :1]).abs().max() < 1e-6
    apart = 100 * torch.eye(4)[None]
    assert mutual_information(apart).item() == pytest.approx(math.log(4), rel=1e-5)


def test_variance_against_a_loop(leaf_logits):
    p = leaf_logits.softmax(-1)
    for image in range(3):
        by_class = [sum((p[image, n, c] - p[image, :, c].mean()) ** 2 for n in range(4)) / 4 for c in range(5)]
        assert variance(leaf_logits)[image].item() == pytest.approx(float(sum(by_class)) / 5, rel=1e-4)


def test_maps_hold_the_measures_of_every_pixel(leaf_logits):
    """40 images are a map of 4 by 5 pixels of two images."""
    maps = leaf_logits.unflatten(0, (2, 4, 5)).movedim((3, 4), (1, 2))  # (N, leaves, classes, H, W)
    for measure in (mutual_information, variance):
        torch.testing.assert_close(measure(maps).flatten(), measure(leaf_logits))
    for measure in MEASURES:
        flat = certainty(leaf_logits.mean(1), leaf_logits.argmax(2), measure)
        torch.testing.assert_close(certainty(maps.mean(1), maps.argmax(2), measure).flatten(), flat)


def test_risk_coverage_by_hand():
    curve = risk_coverage(torch.tensor([0.9, 0.5, 0.7, 0.6]), torch.tensor([True, False, True, True]))
    assert curve.coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert curve.risk.tolist() == [0, 0, 0, 0.25]
    assert curve.area == pytest.approx(0.25 / 4)


def test_equally_sure_answers_are_given_together_whatever_their_order():
    sure, correct = torch.tensor([0.9, 0.5, 0.5, 0.5]), torch.tensor([True, False, True, True])
    curves = [risk_coverage(sure, correct[order]) for order in ([0, 1, 2, 3], [0, 3, 2, 1])]
    assert all(curve.coverage.tolist() == [0.25, 1.0] for curve in curves)
    assert curves[0].area == curves[1].area == pytest.approx(0.25 * 3 / 4)


def test_risk_coverage_of_no_images_raises_an_error():
    with pytest.raises(ValueError, match="no image"):
        risk_coverage(torch.zeros(0), torch.zeros(0))
